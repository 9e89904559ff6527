"""The server on Ray Serve: the answers of the plain one, its keys, and a restart that nobody who was let in notices."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

KEY = "key-of-the-ray-test"
HEADERS = {"authorization": f"Bearer {KEY}", "x-request-id": "the-same"}
TEXTS = ["a red apple", "a green pear", "树上的苹果"]
ASKED: list[tuple[str, str, Any]] = [
    ("POST", "/v1/rerank", {"query": "an apple", "documents": TEXTS, "top_n": 2, "return_documents": True}),
    ("POST", "/rerank", {"query": "an apple", "texts": TEXTS, "raw_scores": True}),
    ("POST", "/score", {"text_1": "an apple", "text_2": TEXTS}),
    ("POST", "/v1/ranking", {"query": {"text": "an apple"}, "passages": [{"text": text} for text in TEXTS]}),
    ("POST", "/v1/rerank", {"query": "", "documents": TEXTS}),
    ("POST", "/v1/rerank", {"query": "a", "documents": "no list"}),
    ("POST", "/v1/rerank", {"query": "a", "documents": ["b"], "model": "another"}),
    ("GET", "/info", None),
    ("GET", "/health/ready", None),
    ("GET", "/nowhere", None),
]


@pytest.fixture(scope="module")
def arguments():
    from qwen_rerank.serve.ray import RayServeArguments

    return RayServeArguments(model="pocket", dtype="float32", deterministic=True, served_name="fruit", cpus=0.5)


@pytest.fixture(scope="module")
def address(cluster, arguments):
    """The server's address on Ray."""
    from ray import serve

    from qwen_rerank.serve.ray import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_RERANK_API_KEYS", KEY)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(arguments), logging_config={"enable_access_log": False})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def wait_until(is_so: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        time.sleep(0.05)


def without_its_second(content: bytes) -> bytes:
    """An answer's bytes without when it was made, which two servers asked in turn need not share."""
    return re.sub(rb'"created":\d+', b'"created":0', content)


def test_its_answers_are_those_of_the_plain_server(address, arguments):
    import httpx2
    from starlette.testclient import TestClient

    from qwen_rerank import load_scorer
    from qwen_rerank.serve.app import create_app

    scorer = load_scorer("pocket", dtype="float32", deterministic=True)
    plain = create_app(scorer, settings=arguments.settings(), api_keys=[KEY])
    with TestClient(plain) as beside, httpx2.Client(base_url=address, timeout=60) as on_ray:
        wait_until(lambda: beside.get("/health/ready").status_code == 200)
        for headers in (HEADERS, {"x-request-id": "no-key"}):
            for method, path, body in ASKED:
                wanted = beside.request(method, path, json=body, headers=headers)
                found = on_ray.request(method, path, json=body, headers=headers)
                assert found.status_code == wanted.status_code, path
                assert without_its_second(found.content) == without_its_second(wanted.content), path
                # Ray's proxy says it once more.
                assert set(found.headers["x-request-id"].split(", ")) == {wanted.headers["x-request-id"]}


def test_a_rolling_restart_loses_no_request(address, arguments):
    import httpx2
    from ray import serve

    from qwen_rerank.serve.ray import app

    ended, statuses = threading.Event(), []

    def ask() -> None:
        body = {"query": "an apple", "documents": TEXTS}
        with httpx2.Client(base_url=address, headers=HEADERS, timeout=60) as client:
            while not ended.is_set():
                try:
                    statuses.append(client.post("/v1/rerank", json=body).status_code)
                except httpx2.HTTPError as exc:
                    statuses.append(repr(exc))

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QWEN_RERANK_API_KEYS", KEY)
            serve.run(app(arguments.model_copy(update={"served_name": "vegetables"})))
        after = len(statuses)
        wait_until(lambda: len(statuses) >= after + 10)
    finally:
        ended.set()
        for caller in callers:
            caller.join()

    assert set(statuses) == {200}
    names = httpx2.get(f"{address}/v1/models", headers=HEADERS).json()["data"]
    assert names[0]["id"] == "vegetables"


def test_it_is_not_open_by_accident(arguments, monkeypatch):
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.serve.ray import app

    monkeypatch.delenv("QWEN_RERANK_API_KEYS", raising=False)

    with pytest.raises(InvalidInputError, match="no API key is set"):
        app(arguments)
    assert app(arguments.model_copy(update={"no_auth": True}))
    with pytest.raises(InvalidInputError, match=r"max_replicas \(1\) must be at least replicas \(2\)"):
        app(arguments.model_copy(update={"no_auth": True, "replicas": 2, "max_replicas": 1}))


def test_words_of_the_command_line_become_arguments():
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as started

    from qwen_rerank.serve.ray import app

    words = {"model": "pocket", "no_auth": "true", "gpus": "0.5", "max_replicas": "3"}
    deployment = started(app, words)._bound_deployment

    assert deployment.init_args[0].no_auth is True
    assert deployment.ray_actor_options["num_gpus"] == 0.5


def test_a_misspelt_argument_is_refused():
    from pydantic import ValidationError

    from qwen_rerank.serve.ray import RayServeArguments

    with pytest.raises(ValidationError, match="modle"):
        RayServeArguments(modle="pocket")
