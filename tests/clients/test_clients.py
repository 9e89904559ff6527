"""Real client packages, unchanged, against a real server process: the answer of each is the model's own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rerank.scorers.qwen import QwenScorer
from tests.clients.catalogue import CLIENTS, Client
from tests.clients.environments import python_of
from tests.serve.conftest import KEY
from tests.serve.process import running

# Making an environment takes up to a minute, more on a slow line.
pytestmark = [pytest.mark.clients, pytest.mark.timeout(1_200)]

SCRIPTS = Path(__file__).parent / "scripts"
NAME = "house-reranker"  # what the server calls the model; the clients know no such name
QUERY = "适合程序员的机械键盘"
DOCUMENTS = [
    "静音红轴机械键盘，适合程序员办公室使用。",
    "机械键盘清洁套装，不含键盘本体。",
    "手冲咖啡壶，配温度计。",
    "A quiet mechanical keyboard for programmers.",
    "How to bake sourdough bread: it's all in the <|im_end|> starter.",
    "青轴电竞机械键盘，声音清脆。",
]
INSTRUCTION = "Find the product that the shopper wants"
TOP_N = 5

Ask = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The address of a server that wants a key."""
    with serving({"QWEN_RERANK_API_KEYS": KEY}) as server:
        yield server.url


@pytest.fixture(scope="module")
def unguarded() -> Iterator[str]:
    """The address of a server that wants none."""
    with serving({}) as server:
        yield server.url


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    """The address of a server that wants a key and repeats documents as strings."""
    with serving({"QWEN_RERANK_API_KEYS": KEY}, "--plain-documents") as server:
        yield server.url


def serving(env: dict[str, str], *options: str):
    command = ["-m", "qwen_rerank", "serve", "--model", "pocket", "--device", "cpu", "--port", "0"]
    return running([*command, "--served-name", NAME, *options], env=env)


@lru_cache
def answers(group: str, url: str, key: str) -> dict[str, Any]:
    """Return what the clients of an environment made of the same question, by name."""
    told = {"url": url, "key": key, "model": NAME, "query": QUERY, "documents": DOCUMENTS}
    asked = json.dumps(told | {"instruction": INSTRUCTION, "top_n": TOP_N})
    command = [python_of(group), SCRIPTS / f"with_{group}.py", asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=SCRIPTS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # some clients print advertisements first


@pytest.fixture(scope="module")
def expected() -> Callable[..., np.ndarray]:
    """Returns the model's own log-odds, `(n_documents,)`."""
    with QwenScorer("pocket", device="cpu") as scorer:
        plain = scorer.score(QUERY, DOCUMENTS)
        instructed = scorer.score(QUERY, DOCUMENTS, instruction=INSTRUCTION)
    return lambda *, instruction: instructed if instruction else plain


def each(wanted: Callable[[Client], bool] = lambda _: True) -> list[Any]:
    pairs = [(client, call) for client in CLIENTS if wanted(client) for call in client.calls]
    return [pytest.param(client, call, id=f"{client.group}/{call}") for client, call in pairs]


@pytest.mark.parametrize(("client", "call"), each())
def test_the_order_and_scores_are_the_models_own(client, call, request, expected):
    server = "plain" if client.plain_documents else "guarded" if client.sends_key else "unguarded"
    url = request.getfixturevalue(server)
    answer = answers(client.group, url, KEY)[call]
    assert "error" not in answer, answer["error"]
    log_odds = expected(instruction=answer["instructed"]).astype(np.float64)
    order = [int(place) for place in np.argsort(-log_odds, kind="stable")[:TOP_N]]
    scores = log_odds if answer["log_odds"] else 1 / (1 + np.exp(-log_odds))

    assert [hit[0] for hit in answer["hits"]] == order
    assert [hit[1] for hit in answer["hits"]] == pytest.approx([scores[place] for place in order], rel=1e-4)
    assert all(hit[2:] in ([], [DOCUMENTS[hit[0]]]) for hit in answer["hits"])


@pytest.mark.parametrize(("client", "call"), each(lambda client: client.shows_error and client.sends_key))
def test_a_refused_client_shows_the_servers_words(client, call, guarded):
    answer = answers(client.group, guarded, "a-key-that-opens-nothing")[call]

    assert "this server needs an API key" in answer["error"]


@pytest.mark.parametrize("group", dict.fromkeys(client.group for client in CLIENTS))
def test_every_call_of_a_script_is_in_the_catalogue(group, guarded):
    listed = [call for client in CLIENTS if client.group == group for call in client.calls]

    assert sorted(answers(group, guarded, KEY)) == sorted(listed)
