"""One scorer, many callers, many servers."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest

from qwen_rerank.errors import (
    BackendRejectedError,
    BackendUnavailableError,
    InvalidInputError,
    RerankTimeoutError,
    ScorerClosedError,
)
from qwen_rerank.protocols import Scorer
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.http import HttpScorer, transport
from qwen_rerank.scorers.http.endpoints import EndpointPool
from tests.scorers.http import wire
from tests.scorers.http.stub import Reply, raw_server, serving

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def server():
    with serving(wire.LlamaCpp().handle) as server:
        yield server


@pytest.fixture
def scorer(server):
    with HttpScorer(server.url, dialect="llamacpp") as scorer:
        yield scorer


def n_threads():
    return sum(thread.name.startswith("qwen-rerank-http") for thread in threading.enumerate())


@contextmanager
def asked_and_silent():
    """A server that says when it was asked and when its connection was closed, and answers nothing."""
    asked, closed = threading.Event(), threading.Event()

    def act(connection):
        asked.set()
        while connection.recv(65_536):
            pass
        closed.set()

    with raw_server(act) as url:
        yield url, asked, closed


def test_it_is_a_scorer(scorer):
    assert isinstance(scorer, Scorer)


def test_no_documents_ask_nobody():
    scorer = HttpScorer("http://127.0.0.1:9", dialect="llamacpp")

    assert scorer.score("q", []).shape == (0,)
    assert [s.shape for s in scorer.score_many(["a", "b"], [[], []])] == [(0,), (0,)]


def test_equal_texts_are_sent_once_and_score_the_same(scorer, server):
    scores = scorer.score("q", ["a 1", "b 2", "a 1"])

    assert server.posts[0].json["documents"] == ["a 1", "b 2"]
    assert scores[0] == scores[2]


async def test_async_and_sync_callers_share_one_pool(scorer):
    together = await asyncio.gather(
        scorer.ascore("q", ["a 1"]), asyncio.to_thread(scorer.score, "q", ["a 1"]), scorer.ascore_many(["q"], [["a 1"]])
    )

    assert together[0] == together[1] == together[2][0]
    assert n_threads() == 1


def test_a_scorer_outlives_the_loops_of_its_callers(scorer):
    first = asyncio.run(scorer.ascore("q", ["a 1"]))
    second = asyncio.run(scorer.ascore("q", ["a 1"]))

    assert first == second


async def test_a_cancelled_caller_leaves_no_task_and_no_connection():
    with asked_and_silent() as (url, asked, closed), HttpScorer(url, dialect="tei", timeout_s=300) as scorer:
        call = asyncio.create_task(scorer.ascore("q", ["d"]))
        assert await asyncio.to_thread(asked.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(closed.wait, 60)
        await asyncio.wrap_future(scorer._transport.submit(_alone))


async def _alone():
    """Return once this is the only task of the loop."""
    async with asyncio.timeout(60):
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)


def test_closing_ends_thread_and_connections(server, recwarn):
    scorer = HttpScorer(server.url, dialect="llamacpp")
    scorer.score("q", ["a"])
    scorer.close()
    scorer.close()

    assert n_threads() == 0
    assert not [w for w in recwarn if w.category is ResourceWarning]
    with pytest.raises(ScorerClosedError, match="was closed"):
        scorer.score("q", ["a"])


def test_the_deadline_holds_while_another_caller_asks_what_the_server_is():
    async def hold(asking):
        async with scorer._transport.once:
            asking.set()
            await asyncio.Event().wait()

    with HttpScorer("http://127.0.0.1:9", dialect="tei", timeout_s=0.1) as scorer, ThreadPoolExecutor(1) as pool:
        asking = threading.Event()
        scorer._transport.submit(lambda: hold(asking))
        assert asking.wait(60)
        call = pool.submit(scorer.score, "q", ["d"])
        try:
            with pytest.raises(RerankTimeoutError, match="no whole answer in time"):
                call.result(60)
        finally:
            scorer.close()


def test_closing_ends_the_calls_that_wait_with_a_sentence():
    with asked_and_silent() as (url, asked, closed), ThreadPoolExecutor(1) as pool:
        scorer = HttpScorer(url, dialect="tei", timeout_s=300)
        call = pool.submit(scorer.score, "q", ["d"])
        assert asked.wait(60)
        scorer.close()

        with pytest.raises(ScorerClosedError, match="was closed while it was asked"):
            call.result(60)
        assert closed.wait(60)


def test_a_forgotten_scorer_ends_its_thread(server):
    HttpScorer(server.url, dialect="llamacpp").score("q", ["a"])
    gc.collect()

    assert n_threads() == 0


async def test_a_scorer_whose_last_user_is_its_own_loop_ends_too():
    """A given-up call's task may be the last that holds the scorer, so it is collected on the loop it would wait for."""
    with asked_and_silent() as (url, asked, closed):
        call = asyncio.create_task(HttpScorer(url, dialect="tei", timeout_s=300).ascore("q", ["d"]))
        assert await asyncio.to_thread(asked.wait, 60)
        [thread] = [thread for thread in threading.enumerate() if thread.name.startswith("qwen-rerank-http")]
        call.cancel()
        await asyncio.wait([call])
        del call
        await asyncio.to_thread(thread.join, 60)
        assert not thread.is_alive()
        assert await asyncio.to_thread(closed.wait, 60)


@needs_fork
def test_a_forked_child_opens_connections_of_its_own(scorer):
    expected = scorer.score("q", ["a 1"])[0]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(float(scorer.score("q", ["a 1"])[0])).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 100)
    os.waitpid(child, 0)

    assert json.loads(told) == pytest.approx(expected)
    assert scorer.score("q", ["a 1"])[0] == expected


LEAVES = """
import os, sys
from qwen_rerank import HttpScorer
scorer = HttpScorer(sys.argv[1], dialect="llamacpp")
scorer.score("q", ["a 1"])
if len(sys.argv) > 2:
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("how", [[], pytest.param(["fork"], marks=needs_fork)])
def test_a_process_and_its_forked_child_end_without_closing(server, how):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LEAVES, server.url, *how], timeout=120)

    assert done.returncode == 0


def test_score_many_runs_requests_side_by_side():
    both = threading.Barrier(2, timeout=60)

    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        both.wait()
        return {"results": [{"index": 0, "relevance_score": 0.5}]}

    with serving(handle) as server, HttpScorer(server.url, dialect="llamacpp", max_concurrency=2) as scorer:
        assert len(scorer.score_many(["a", "b"], [["x"], ["y"]])) == 2


def test_more_requests_than_allowed_wait():
    running, most = 0, 0
    lock = threading.Lock()

    def handle(request):
        nonlocal running, most
        if request.method == "GET":
            return Reply(404, {})
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return {"results": [{"index": 0, "relevance_score": 0.5}]}

    with serving(handle) as server, HttpScorer(server.url, dialect="llamacpp", max_concurrency=3) as scorer:
        scorer.score_many([f"q{i}" for i in range(12)], [["d"]] * 12)

    assert most <= 3


# --- several servers -------------------------------------------------------------------------------------------------


def test_work_is_spread_over_equal_servers():
    with (
        serving(wire.LlamaCpp().handle) as one,
        serving(wire.LlamaCpp().handle) as two,
        HttpScorer([one.url, two.url], dialect="llamacpp") as scorer,
    ):
        scorer.score_many([f"q{i}" for i in range(20)], [["d 1"]] * 20)

    assert min(len(one.posts), len(two.posts)) >= 5


def _llamacpp_with(name):
    server = wire.LlamaCpp()

    def handle(request):
        if request.path == "/v1/models":
            return Reply(404) if name is None else {"data": [{"id": name, "owned_by": "llamacpp"}]}
        return server.handle(request)

    return handle


@pytest.mark.parametrize(("other", "refused"), [("models/Other-4B", True), ("/data/Qwen3-Reranker-0.6B", False)])
def test_servers_of_different_models_are_refused_at_first_contact(other, refused):
    """One model in another folder is the same, and servers that say nothing are taken at the user's word."""
    with (
        serving(_llamacpp_with("Qwen/Qwen3-Reranker-0.6B")) as one,
        serving(_llamacpp_with(other)) as two,
        serving(_llamacpp_with(None)) as silent,
        HttpScorer([silent.url, one.url, two.url], dialect="llamacpp") as scorer,
    ):
        if not refused:
            assert len(scorer.score("q", ["d 1"])) == 1
            return
        said = f"{one.url} serves Qwen/Qwen3-Reranker-0.6B and {two.url} serves {other}; give servers of one model"
        with pytest.raises(InvalidInputError, match=re.escape(said)):
            scorer.score("q", ["d 1"])

    assert not [*one.posts, *two.posts, *silent.posts]


def test_a_dead_server_is_left_out(monkeypatch):
    monkeypatch.setattr(transport, "BACKOFF_S", 0.01)
    with serving(wire.LlamaCpp().handle) as alive, serving(wire.LlamaCpp().handle) as gone:
        urls = [gone.url, alive.url]
        with HttpScorer(urls, dialect="llamacpp") as scorer:
            gone.close()
            for i in range(10):
                assert len(scorer.score(f"q{i}", ["d 1"])) == 1


def test_all_that_a_dying_server_had_is_repeated_elsewhere():
    """More requests than retries are allowed at a server that struggles: none is lost while another server answers."""
    with (
        serving(wire.LlamaCpp().handle) as alive,
        raw_server(lambda connection: None) as dying,
        HttpScorer([dying, alive.url], dialect="llamacpp", max_concurrency=30) as scorer,
    ):
        scores = scorer.score_many([f"q{i}" for i in range(60)], [["d 1"]] * 60)

    assert len(scores) == len(alive.posts) == 60


def test_a_failing_server_is_out_for_a_while_and_then_tried_by_one_request():
    pool = EndpointPool(["http://a", "http://b"])
    bad = pool.endpoints[0]
    pool.release(_take(pool, bad, now=0.0), 0.0, failed=True, failures_then=0)

    assert {pool.acquire(0.5).url for _ in range(4)} == {"http://b"}
    assert [pool.acquire(1.5).url for _ in range(3)].count("http://a") == 1
    pool.release(bad, 1.6, failed=False, failures_then=1)
    assert pool.acquire(1.7).url == "http://a"


def _take(pool, wanted, *, now):
    while (endpoint := pool.acquire(now)) is not wanted:
        pool.release(endpoint, now, failed=False, failures_then=0)
    return endpoint


def test_the_least_busy_server_is_asked():
    pool = EndpointPool(["http://a", "http://b", "http://c"])
    taken = [pool.acquire(0.0).url for _ in range(6)]

    assert sorted(taken) == ["http://a", "http://a", "http://b", "http://b", "http://c", "http://c"]


def test_outages_grow_up_to_half_a_minute():
    pool = EndpointPool(["http://a"])
    waits = []
    for failures in range(8):
        pool.release(pool.acquire(0.0), 0.0, failed=True, failures_then=failures)
        waits.append(pool.endpoints[0].retry_at)

    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_all_that_a_dying_server_had_count_as_one_failure():
    """Twelve that end together say one thing, so it is out for a second; the one that tries it then, for two."""
    pool = EndpointPool(["http://a"])
    taken = [pool.acquire(0.0) for _ in range(12)]
    for i, endpoint in enumerate(taken):
        pool.release(endpoint, i / 100, failed=True, failures_then=0)
    assert (pool.endpoints[0].failures, pool.endpoints[0].retry_at) == (1, 1.0)

    pool.release(pool.acquire(1.5), 1.5, failed=True, failures_then=1)
    assert (pool.endpoints[0].failures, pool.endpoints[0].retry_at) == (2, 3.5)


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_configuration_builds_an_equal_scorer_without_the_key():
    scorer = HttpScorer(
        ["http://a/", "http://b"], dialect="vllm", model="m", api_key="sk-1", instruction="x", timeout_s=5
    )
    again = HttpScorer(**json.loads(json.dumps(asdict(scorer.config))))

    assert again.config == scorer.config
    assert again.fingerprint == scorer.fingerprint
    assert "sk-1" not in json.dumps(asdict(scorer.config))


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"instruction": "y"}, {"max_length": 100}, {"scores": "logit"}, {"dialect": "sglang"}]
)
def test_the_fingerprint_changes_with_what_changes_a_score(change):
    base = {"dialect": "vllm", "model": "m"}

    assert HttpScorer("http://a", **base).fingerprint != HttpScorer("http://a", **(base | change)).fingerprint


def test_the_fingerprint_does_not_change_with_what_changes_no_score():
    one, two = (
        HttpScorer("http://a", dialect="vllm", model="m"),
        HttpScorer("http://b", dialect="vllm", model="m", timeout_s=1),
    )

    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dialect": "vlm"}, "dialect must be one of"),
        ({"mode": "ids"}, "mode must be one of"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"template": "jinja"}, "template must be one of"),
        ({"dialect": "tei", "mode": "token-ids", "tokenizer": "x"}, "takes no token ids"),
        ({"tokenizer": "\ud800"}, "lone surrogate"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(InvalidInputError, match=message):
        HttpScorer("http://host", **options)


@pytest.mark.parametrize(
    ("query", "documents", "message"),
    [(" ", ["d"], "query is empty"), ("q", "d", "documents must be a list"), ("q", ["\ud800"], "lone surrogate")],
)
def test_wrong_arguments_ask_nobody(scorer, server, query, documents, message):
    with pytest.raises(InvalidInputError, match=message):
        scorer.score(query, documents)

    assert server.requests == []


def test_errors_survive_the_way_between_processes():
    error = BackendUnavailableError("gone", url="http://a", status=503, excerpt="x")
    copy = pickle.loads(pickle.dumps(error))

    assert (type(copy), str(copy), copy.url, copy.status) == (BackendUnavailableError, "gone", "http://a", 503)
    assert isinstance(RerankTimeoutError("late", url="http://a"), TimeoutError)


# --- saturated probabilities -----------------------------------------------------------------------------------------


def test_saturated_probabilities_are_clipped_flagged_and_keep_their_order(caplog):
    reported = [1.0, 0.0, 1.0 - 1e-12, 1e-12, 0.5, 1.0]
    reply = {"results": [{"index": i, "relevance_score": p} for i, p in enumerate(reported)]}
    handle = lambda request: reply if request.method == "POST" else Reply(404, {})  # noqa: E731
    with serving(handle) as server, HttpScorer(server.url, dialect="llamacpp") as scorer:
        details = scorer.score_details("q", [f"d{i}" for i in range(6)])

    assert list(details.saturated) == [True, True, True, True, False, True]
    assert np.abs(details.log_odds).max() == 20
    assert list(np.argsort(-details.log_odds, kind="stable")) == [0, 5, 2, 4, 3, 1]
    assert details.log_odds[0] == details.log_odds[5] > details.log_odds[2]
    assert "clipped at ±20" in caplog.text


# --- in other parts of the package -----------------------------------------------------------------------------------


def test_a_threshold_on_uncalibrated_scores_needs_a_calibration():
    with pytest.raises(InvalidInputError, match="threshold"):
        Reranker(HttpScorer("https://api.cohere.com", model="rerank-v4"), threshold=0.5)


def test_a_wrong_key_is_said_before_the_dialect_is_guessed():
    with (
        serving(lambda request: Reply(401, {"error": "Unauthorized"})) as server,
        HttpScorer(server.url, api_key="wrong") as scorer,
        pytest.raises(BackendRejectedError, match="refused the request with 401: Unauthorized"),
    ):
        scorer.score("q", ["d"])


def test_it_is_a_compressors_scorer(server):
    langchain = pytest.importorskip("qwen_rerank.langchain")
    documents = pytest.importorskip("langchain_core.documents")
    compressor = langchain.QwenRerankCompressor(scorer=HttpScorer(server.url, dialect="llamacpp"), top_n=1)

    [best] = compressor.compress_documents([documents.Document("a 1"), documents.Document("b 2")], "q")

    assert best.page_content == "b 2"
