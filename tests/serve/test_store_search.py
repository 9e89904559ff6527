"""`/v1/search`: the server's store in two rounds, filtered, bounded, and shown by the command as if it were searched here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from datetime import date
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from qwen_rerank import FaissStore
from qwen_rerank.cli import app, options, show, warm_search
from qwen_rerank.errors import BackendRejectedError, InvalidInputError, ProtocolError
from qwen_rerank.folders import sync_folder
from qwen_rerank.scorers.http.answers import HttpAnswer
from qwen_rerank.serve import store_search
from qwen_rerank.testing import OverlapScorer
from qwen_rerank.types import Candidate, Document
from tests.serve.conftest import KEY, app_client, live_server

runner = CliRunner()


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A store of words over a folder with Chinese names."""
    home = tmp_path_factory.mktemp("home")
    (home / "资料").mkdir()
    (home / "资料" / "租约.md").write_text("# 租约\n\n租约六月到期。\n\n# 押金\n\n押金两个月退还。\n", encoding="utf-8")
    (home / "资料" / "dog.txt").write_text("The lease ends in June. The dog eats at six.\n")
    with FaissStore.create(home / "store", None) as store:
        sync_folder(store, [home / "资料"])
    with FaissStore.open(home / "store", None, read_only=True) as store:
        yield store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of whole documents that come from no file."""
    with FaissStore.create(tmp_path_factory.mktemp("whole") / "store", None) as store:
        store.add([Document(str(n), f"red {'planet ' * n}", {"n": n}) for n in range(1, 9)])
        yield store


@pytest.fixture(scope="module")
def servers(notes, whole):
    """One server over each store, by name."""
    with (
        live_server(OverlapScorer, first_stage=notes) as first,
        live_server(OverlapScorer, first_stage=whole) as second,
    ):
        yield {"notes": first, "whole": second}


async def found(store, **wanted):
    async with app_client(OverlapScorer(), first_stage=store) as client:
        return await client.post("/v1/search", json={"query": "租约到期 lease", **wanted})


async def test_a_search_gives_both_ranks_the_place_and_what_stands_around(notes):
    answer = (await found(notes, context=1, top_n=2, suffixes=["md"])).json()

    assert (answer["searched"], answer["candidates"]) == (3, len(answer["results"]))
    first = answer["results"][0]
    assert (first["rank"], first["place"], first["metadata"]["heading"]) == (1, "资料/租约.md:1", "租约")
    assert [one["text"] for one in first["below"]] == ["# 押金\n\n押金两个月退还。"]


@pytest.mark.parametrize(
    ("wanted", "sources"),
    [
        ({"paths": ["*.txt"]}, {"资料/dog.txt"}),
        ({"suffixes": [".md"]}, {"资料/租约.md"}),
        ({"since": "2100-01-01"}, set()),
        ({"until": "2100-01-01"}, {"资料/dog.txt", "资料/租约.md"}),
        ({"threshold": 1.0}, set()),
    ],
    ids=str,
)
async def test_filters_keep_what_they_say(notes, wanted, sources):
    answer = (await found(notes, **wanted)).json()

    assert {hit["metadata"]["source"] for hit in answer["results"]} == sources


@pytest.mark.parametrize(
    ("wanted", "status", "param"),
    [
        ({"query": " "}, 422, "query"),
        ({"paths": ["nothing*"]}, 422, "paths"),
        ({"paths": ["*"] * 21}, 422, "paths"),
        ({"paths": ["*" * 301]}, 422, "paths[0]"),
        ({"since": "yesterday"}, 422, "since"),
        ({"top_k": 0}, 422, "top_k"),
        ({"top_k": 1_001}, 413, "top_k"),
        ({"top_n": 101}, 422, "top_n"),
        ({"context": 21}, 422, "context"),
        ({"threshold": "high"}, 422, "threshold"),
    ],
    ids=str,
)
async def test_what_cannot_be_searched_for_is_refused_with_the_field(notes, wanted, status, param):
    answer = await found(notes, **wanted)

    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert str(notes.path) not in answer.text


async def test_a_server_without_a_store_says_so_and_one_with_a_key_asks_for_it(notes):
    async with app_client() as client:
        none = await client.post("/v1/search", json={"query": "q"})
    async with app_client(first_stage=notes, keys=(KEY,)) as client:
        closed = await client.post("/v1/search", json={"query": "q"})

    assert (none.status_code, closed.status_code) == (422, 401)
    assert "start it with --store" in none.json()["detail"]


async def test_an_answer_that_would_be_too_long_is_refused(whole, monkeypatch):
    monkeypatch.setattr(store_search, "MOST_ANSWER_CHARS", 100)

    async with app_client(OverlapScorer(), first_stage=whole) as client:
        page = await client.post("/playground/search", json={"query": "red planet", "collection": "store"})

    for answer in (page, await found(whole, query="red planet")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "answer_too_long")


async def test_whatever_another_first_stage_finds_is_answered():
    class Odd:
        def search(self, query, top_k, *, filter=None):
            about = {"day": date(2024, 5, 1), "share": float("nan"), "of": [np.float32(1.5)], 3: None}
            return [Candidate(Document("a", "red planet", about), np.float32(1.5), 1, "cosine")]

    async with app_client(OverlapScorer(), first_stage=Odd()) as client:
        page = await client.post("/playground/search", json={"query": "red planet", "collection": "store"})
    [hit] = (await found(Odd(), query="red planet")).json()["results"]

    assert hit["metadata"] == {"day": "2024-05-01", "share": None, "of": ["1.5"], "3": None}
    assert hit["first_stage_score"] == page.json()["first"][0]["score"] == 1.5


async def test_no_threshold_is_taken_for_scores_that_are_no_probabilities(whole):
    class Raw(OverlapScorer):
        calibrated = False

    async with app_client(Raw(), first_stage=whole) as client:
        answer = await client.post("/v1/search", json={"query": "red", "threshold": 0.5})

    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "no_probability")


async def test_too_many_searches_at_once_are_told_to_come_back(whole, monkeypatch):
    monkeypatch.setattr(store_search, "_MOST_WAITING", 0)

    answer = await found(whole)

    assert (answer.status_code, "retry-after" in answer.headers) == (429, True)


async def test_a_search_that_nobody_waits_for_has_its_turn_until_it_ends():
    end, begun = threading.Event(), []
    turns = store_search.Turns(None)

    def work(_):
        begun.append(1)
        end.wait(30)

    try:
        for _ in range(8):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(turns.take(work), 0.02)
        assert len(begun) <= 4
    finally:
        end.set()
    await asyncio.wait_for(turns.take(work), 30)


async def test_the_page_takes_its_turn_too(whole, monkeypatch):
    monkeypatch.setattr(store_search, "_MOST_WAITING", 0)

    async with app_client(OverlapScorer(), first_stage=whole) as client:
        answer = await client.post("/playground/search", json={"query": "red", "collection": "store"})

    assert answer.status_code == 429


def run(*arguments, **options):
    return runner.invoke(app, ["search", *map(str, arguments)], **options)


@pytest.mark.parametrize("shape", [[], ["--json"], ["--files"], ["--md"], ["-C", "1"], ["--top-n", "1"]], ids=str)
@pytest.mark.parametrize(("name", "query"), [("notes", "租约到期 lease"), ("whole", "red planet"), ("notes", "zzz")])
def test_a_warm_search_prints_what_a_cold_one_does(servers, notes, whole, monkeypatch, name, query, shape):
    monkeypatch.setattr(options, "load_scorer", lambda model, **_: OverlapScorer())
    monkeypatch.setattr(show, "console", Console(width=120))
    store = {"notes": notes, "whole": whole}[name]

    cold, warm = run(store.path, query, *shape), run(servers[name].url, query, *shape)

    assert (cold.exit_code, warm.exit_code) == (0, 0), warm.exception
    assert warm.stdout == cold.stdout
    assert warm.stderr.replace("the server's store", str(store.path)) == cold.stderr


@pytest.mark.parametrize("option", [["--model", "pocket"], ["--embedder", "mini"], ["--max-length", "9"]])
def test_what_is_the_servers_to_say_is_refused(option):
    with pytest.raises(InvalidInputError, match=f"leave {option[0]} out"):
        run("http://127.0.0.1:9", "q", *option, catch_exceptions=False)


def test_the_key_is_read_from_the_environment(notes, monkeypatch):
    with live_server(OverlapScorer, first_stage=notes, keys=(KEY,)) as server:
        with pytest.raises(BackendRejectedError, match="401"):
            run(server.url, "lease", catch_exceptions=False)
        monkeypatch.setenv("QWEN_RERANK_API_KEY", KEY)
        assert run(server.url, "lease", "--files").stdout == "资料/dog.txt\n"


def test_a_key_in_the_address_is_refused_and_an_empty_one_is_none(servers, monkeypatch):
    monkeypatch.setenv("QWEN_RERANK_API_KEY", "sekret")
    with pytest.raises(InvalidInputError, match="url holds the key"):
        run(f"{servers['notes'].url}/sekret", "lease", catch_exceptions=False)
    monkeypatch.setenv("QWEN_RERANK_API_KEY", "")
    assert run(servers["notes"].url, "lease", "--files").stdout == "资料/dog.txt\n"


DATA = st.dictionaries(
    st.sampled_from(["heading", "source", "line", "last_line", "part", "page", "sheet", "row"]),
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
)


@pytest.mark.parametrize("shape", [[], ["--json"], ["--files"], ["--md"], ["-C", "1"]], ids=str)
@settings(max_examples=5)
@given(data=DATA)
@example(data={"heading": 5, "part": 1})
def test_whatever_a_server_says_of_a_passage_is_printed(shape, data):
    hit = {"index": 0, "id": "a", "text": "red", "first_stage_rank": 1, "score": 1, "rank": 1, "metadata": data}
    answer = json.dumps({"candidates": 1, "results": [hit]}).encode()
    with mock.patch.object(warm_search, "ask") as ask:
        ask.return_value = warm_search.read_answer(HttpAnswer("http://server/v1/search", 200, {}, answer), 100)

        assert run("http://server", "red", *shape, catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("[]", "no object"),
        ('{"candidates": 101, "results": []}', "101 candidates"),
        ('{"candidates": true, "results": []}', "candidates"),
        ('{"candidates": 1, "results": [1]}', "results"),
        ('{"candidates": 1, "results": [{"index": 1}]}', "index 1"),
        ('{"candidates": 1, "results": [{"index": 0, "id": "a", "text": "b"}]}', "first_stage_rank"),
        (
            '{"candidates": 1, "results": [{"index": 0, "id": "a", "text": "b", "first_stage_rank": 1, "score": "1"}]}',
            "no number",
        ),
        (
            '{"candidates": 1, "results": [{"index": 0, "id": "a", "text": "b", "first_stage_rank": 1, "score": 1,'
            ' "rank": 1, "best_window": [0, 2]}]}',
            "best_window",
        ),
    ],
)
def test_nothing_is_made_up_for_an_answer_that_is_none(answer, says):
    with pytest.raises(ProtocolError, match=says):
        warm_search.read_answer(HttpAnswer("http://server/v1/search", 200, {}, answer.encode()), 100)
