"""No body costs much more than it weighs: what it would take to read is known before anything of it is built."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import threading
import time
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from qwen_rerank.errors import ScorerError
from qwen_rerank.serve import app as app_module
from qwen_rerank.serve import schemas
from qwen_rerank.serve.app import create_app
from qwen_rerank.serve.backend import State
from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.settings import ServeSettings
from tests.serve import costly
from tests.serve.conftest import app_client
from tests.serve.stubs import Oracle

MOST_CPU_S = 1.0
MOST_LOOP_CPU_S = 0.05
MOST_MEMORY = 8  # times the body's size
SMALL_BYTES = 16 << 20  # as much is left to any body: a hundred thousand values cost that, however short they are


async def post(app: Any, path: str, body: bytes, *headers: tuple[bytes, bytes]) -> int:
    """Send a body to an app as a server does, and return the status; nothing else of it is kept."""
    statuses = []
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.Event().wait()  # the client stays
        raise AssertionError("unreachable")

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return statuses[0]


async def test_a_costly_body_is_scored_or_refused_within_bounds(full):
    """Of some bodies their memory, and by `--full` their CPU time as well, from arrival until handed to the model."""
    chance, scorer = random.Random(17), Oracle()
    sizes = [*[200_000] * 16, 2_000_000, 2_000_000, 8_000_000, 8_300_000] if full else [*[10_000] * 49, 900_000]
    app = create_app(scorer, settings=ServeSettings(any_model=True))
    worst: dict[str, tuple[float, str]] = {"cpu_s": (0, ""), "loop_cpu_s": (0, ""), "memory": (0, "")}
    statuses: Counter[int] = Counter()
    async with app.router.lifespan_context(app):
        await app.state.backend.wait_loaded()

        def no_score(*_: object) -> None:
            raise ScorerError("not scored here")

        scorer._compute = no_score
        gc.freeze()  # as the server does, so that no full pass over the tests' libraries is counted
        for number in range(10_000 if full else 300):
            kind, path, body = costly.body(chance, chance.choice(sizes))
            figures = {"cpu_s": math.inf, "loop_cpu_s": math.inf}
            for _ in range(2):  # what a body costs it costs each time; a pass of the garbage collector comes once
                start, loop_start = time.process_time(), time.thread_time()
                status = await post(app, path, body)
                figures["cpu_s"] = min(figures["cpu_s"], time.process_time() - start)
                figures["loop_cpu_s"] = min(figures["loop_cpu_s"], time.thread_time() - loop_start)
                if figures["cpu_s"] <= MOST_CPU_S and figures["loop_cpu_s"] <= MOST_LOOP_CPU_S:
                    break
            statuses[status] += 1
            if number % 20 == 0 or len(body) > 500_000:  # counting memory takes several times as long
                tracemalloc.start()
                await post(app, path, body)
                figures["memory"] = tracemalloc.get_traced_memory()[1] / max(len(body), SMALL_BYTES // MOST_MEMORY)
                tracemalloc.stop()
            place = f"{kind}, number {number} at {path}: {body[:60]!r}, {len(body)} bytes"
            worst = {name: max(worst[name], (figures.get(name, 0), place)) for name in worst}
    print(f"\ncostly bodies: statuses {dict(sorted(statuses.items()))}, worst {json.dumps(worst, indent=1)}")

    assert worst["memory"][0] <= MOST_MEMORY - 1, worst["memory"]  # the body itself came before
    assert max(statuses) <= 502
    assert statuses[500] == 0
    assert not full or worst["cpu_s"][0] <= MOST_CPU_S, worst["cpu_s"]
    assert not full or worst["loop_cpu_s"][0] <= MOST_LOOP_CPU_S, worst["loop_cpu_s"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param({"query": "q", "documents": ["a"]}, 200, id="scored"),
        pytest.param({"query": "q", "documents": ["a", 1]}, 422, id="no text"),
        pytest.param({"query": "q", "documents": ["fails"]}, 502, id="the model fails"),
    ],
)
async def test_an_answered_request_is_let_go_of_at_once(body, status):
    """An error that holds its calls, which hold it, kept the body until the garbage collector came, which then took long."""

    class Fails(Oracle):
        def value_of(self, text: str) -> float:
            if text == "fails":
                raise ScorerError("not scored here")
            return super().value_of(text)

    scorer = Fails()
    app = create_app(scorer)
    async with app.router.lifespan_context(app):
        await app.state.backend.wait_loaded()
        sent = [json.dumps(body).encode() for _ in range(4)]
        await post(app, "/v1/rerank", sent[0])
        gc.collect()
        gc.disable()
        try:
            found = [await post(app, "/v1/rerank", each) for each in sent]
            await asyncio.sleep(0)
            kept = gc.collect()
        finally:
            gc.enable()

    assert found == [status] * 4
    assert kept == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (schemas.RerankRequest, "documents"),
        (schemas.TeiRequest, "texts"),
        (schemas.RankingRequest, "passages"),
        (schemas.PairsRequest, "documents"),
        (schemas.PairsRequest, "queries"),
        (schemas.SearchRequest, "texts"),
    ],
)
@pytest.mark.parametrize("item", [1, None, {}, [], {"text": 1}], ids=str)
def test_the_first_wrong_item_ends_the_reading(kind, name, item):
    """However many follow, one error is made."""
    body = {"query": "q", "queries": ["q"], "documents": ["a"], name: ["a", *[item] * 900]}

    with pytest.raises(ApiError) as caught:
        schemas.read(kind, body, max_documents=1_000)

    assert caught.value.param == f"{name}[1]"
    assert caught.value.__cause__.error_count() == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/rerank", "documents"),
        ("/rerank", "texts"),
        ("/score", "text_2"),
        ("/score", "queries"),
        ("/v1/ranking", "passages"),
        ("/playground/search", "texts"),
    ],
)
async def test_too_many_texts_are_refused_before_one_is_read(client, monkeypatch, path, name):
    for kind in ("RerankRequest", "TeiRequest", "RankingRequest", "PairsRequest", "SearchRequest"):
        monkeypatch.setattr(getattr(schemas, kind), "model_validate", lambda _: pytest.fail("the texts were read"))

    response = await client.post(path, json={"query": "q", name: ["a"] * 1_001})

    assert response.status_code == 413
    assert f"1001 {name} are more than" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"documents":[' + b'"",' * 100_001 + b'""]}', 413, id="strings"),
        pytest.param(b'{"documents":[' + b'"\\\\",' * 100_001 + b'""]}', 413, id="strings that end in a backslash"),
        pytest.param(b'{"documents":[' + b"1," * 100_001 + b"1]}", 413, id="numbers"),
        pytest.param(b'{"documents":' + b"[" * 100_001 + b"]" * 100_001 + b"}", 413, id="brackets"),
        pytest.param(b'{"a":[' + b"{}," * 60_000 + b"{}]}", 413, id="objects"),
        pytest.param(b'{"a"' + b":" * 100_001 + b"1}", 413, id="colons"),
        pytest.param(b'{"a":1' + b"}" * 100_001, 400, id="closed too often"),
        pytest.param(b'{"a":' + b"9" * 401 + b"}", 400, id="digits"),
        pytest.param(b'{"a":0.' + b"1" * 400 + b"}", 400, id="decimals"),
        pytest.param(b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", 400, id="depth"),
    ],
)
def test_a_body_too_complex_is_refused_before_a_value_is_built(monkeypatch, body, status):
    monkeypatch.setattr(schemas, "from_json", lambda *_, **__: pytest.fail("values were built"))

    with pytest.raises(ApiError) as caught:
        schemas.parse_object(body)

    assert caught.value.status == status


@pytest.mark.parametrize(
    "text",
    [
        '"',
        "\\",
        '\\"',
        '\\\\"',
        '[{"a":1},' * 50_000,
        "]" * 200_000,
        "9" * 5_000,
        '","' * 200_000,
        "\n\t\x00",
        "{:}" * 99,
    ],
)
def test_what_stands_in_a_text_never_counts_as_structure(text):
    body = {"query": text, "documents": [text, text + "\\"], text: text}

    assert schemas.parse_object(json.dumps(body).encode()) == body
    assert schemas.parse_object(json.dumps(body, ensure_ascii=False, indent=3).encode()) == body


async def test_a_large_body_is_read_and_answered_beside_the_event_loop(monkeypatch):
    threads = []

    def noted(real):
        def call(*args, **options):
            threads.append(threading.current_thread() is threading.main_thread())
            return real(*args, **options)

        return call

    monkeypatch.setattr(app_module, "parse_object", noted(app_module.parse_object))
    monkeypatch.setattr(app_module, "json_response", noted(app_module.json_response))
    async with app_client() as client:
        await client.rerank(documents=["x " * 300_000], return_documents=True)
        large = threads[:]
        await client.rerank()

    assert large == [False, False]
    assert threads[2:] == [True, True]


async def test_settings_in_a_text_are_bounded_as_the_body_is(client):
    for kwargs in (
        "[" * 90_000,
        '{"a":' + "9" * 5_000 + "}",
        "[" + "1," * 40_000 + "1]",
        '{"a": "' + "x" * 100_000 + '"}',
    ):
        response = await client.rerank(kwargs=kwargs)

        assert (response.status_code, response.json()["error"]["param"]) == (422, "kwargs")


async def test_a_playground_search_over_too_many_characters_is_refused(client):
    response = await client.post("/playground/search", json={"query": "q", "texts": ["word " * 2_000] * 41})

    assert response.status_code == 413
    assert "use /v1/rerank" in response.json()["detail"]


async def test_while_the_model_loads_a_body_is_refused_unread(client, monkeypatch):
    monkeypatch.setattr(app_module, "parse_object", lambda _: pytest.fail("the body was read"))
    client.backend.enter(State.LOADING, "the model is loading")

    response = await client.rerank()

    assert response.status_code == 503
    assert "loading" in response.json()["detail"]
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("place", ["instruction", "instruct", "chat_template_kwargs"])
async def test_an_instruction_of_megabytes_is_refused(client, place):
    text = "x" * 100_001

    response = await client.rerank(**{place: {"instruction": text} if place == "chat_template_kwargs" else text})

    assert (response.status_code, response.json()["error"]["param"]) == (422, "instruction")


@pytest.mark.parametrize(
    ("length", "status"),
    [(b"9" * 5_000, 413), (b"9" * 19, 413), (b"0" * 5_000 + b"36", 200)],
    ids=["5,000 digits", "19 digits", "5,000 zeros before it"],
)
async def test_a_length_of_thousands_of_digits_is_read_as_a_number(length, status):
    """Servers of other makes than ours, such as Ray's, hand the header on as it came."""
    app = create_app(Oracle())
    async with app.router.lifespan_context(app):
        await app.state.backend.wait_loaded()
        body = json.dumps({"query": "q", "documents": ["a 1"]}).encode()

        assert await post(app, "/v1/rerank", body, (b"content-length", length)) == status
