"""The score cache: equal scores, nothing computed twice, nothing believed that is damaged."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qwen_rerank import load_scorer
from qwen_rerank.errors import InvalidInputError, ScorerError
from qwen_rerank.scorers.adapted import as_scorer
from qwen_rerank.scorers.base import BaseScorer, ScoreRequest
from qwen_rerank.scorers.cached import CachedScorer, cache_named
from qwen_rerank.scorers.score_cache import KeptScore, ScoreCache, score_key
from qwen_rerank.testing import OverlapScorer, TableScorer
from qwen_rerank.types import Scores

TEXTS = ["red paint", "blue paint", "a red door", ""]


class GatedScorer(BaseScorer):
    """Counts what it scores, and waits for `gate`; a text's log-odds are its length."""

    def __init__(self, fingerprint="gated"):
        self.name = "gated"
        self.fingerprint = fingerprint
        self.seen = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.error = None

    def _compute(self, requests):
        self.seen += [(request.query, text) for request in requests for text in request.texts]
        self.begun.set()
        assert self.gate.wait(30)
        if self.error:
            raise self.error
        return [self._of(request) for request in requests]

    def _of(self, request):
        lengths = np.array([len(text) for text in request.texts])
        return Scores(lengths.astype(np.float32) / 3, lengths.astype(np.int32), lengths.astype(np.int32))


@pytest.fixture
def inner():
    return GatedScorer()


def waiting_on(cached, n):
    """Wait until a flight of `cached` has `n` calls."""
    until(lambda: any(flight.waiting == n for flight in list(cached._flights.values())))


def until(true):
    done = threading.Event()
    for _ in range(3000):
        if true():
            return
        done.wait(0.01)
    pytest.fail("waited in vain")


@pytest.mark.parametrize("path", [None, "scores.db"])
def test_cached_scores_are_the_scorers_own(tmp_path, path):
    """First, again, partly known, with duplicates, and of several queries; also tokens and characters."""
    plain, cache = OverlapScorer(), ScoreCache(None if path is None else tmp_path / path)
    cached = CachedScorer(OverlapScorer(), cache=cache)
    for texts in (TEXTS, TEXTS, [*TEXTS, "new", "red paint"]):
        ours, theirs = cached.score_details("red paint", texts), plain.score_details("red paint", texts)
        for name in ("log_odds", "tokens", "kept_chars"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
    many = cached.score_many(["red", "red paint", "red"], [TEXTS, TEXTS[:1], []])

    assert [scores.tolist() for scores in many] == [
        scores.tolist() for scores in plain.score_many(["red", "red paint", "red"], [TEXTS, TEXTS[:1], []])
    ]
    assert cached.fingerprint == plain.fingerprint


def test_a_score_is_computed_once(inner):
    cached = CachedScorer(inner)
    for texts in (["a", "b"], ["b", "a", "c"], ["c", "c"]):
        cached.score("q", texts)

    assert inner.seen == [("q", "a"), ("q", "b"), ("q", "c")]
    assert (cached.cache.hits, cached.cache.misses) == (3, 3)


@pytest.mark.parametrize(
    "other",
    [("f2", None, "q", "t"), ("f", "i", "q", "t"), ("f", "", "q", "t"), ("f", None, "qt", ""), ("f", None, "", "qt")],
)
def test_all_that_changes_a_score_is_in_its_key(other):
    assert score_key(*other) != score_key("f", None, "q", "t")


def test_scorers_of_other_fingerprints_share_a_cache_and_no_score():
    cache = ScoreCache()
    one, other = GatedScorer("bf16"), GatedScorer("int8")
    for scorer in (one, other):
        CachedScorer(scorer, cache=cache).score("q", ["a"])

    assert one.seen == other.seen == [("q", "a")]


def test_equal_calls_under_way_are_computed_once(inner):
    """From threads and coroutines, also where only some of the texts are the same."""
    cached = CachedScorer(inner)
    inner.gate.clear()

    async def both():
        return await asyncio.gather(cached.ascore("q", ["a", "bb"]), cached.ascore("q", ["bb"]))

    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(cached.score, "q", ["a", "bb"])
        assert inner.begun.wait(30)
        rest = [threads.submit(cached.score, "q", ["bb", "a"]) for _ in range(6)]
        rest.append(threads.submit(asyncio.run, both()))
        waiting_on(cached, 9)
        inner.gate.set()
        found = [each.result(30) for each in (first, *rest)]

    assert inner.seen == [("q", "a"), ("q", "bb")]
    assert [scores.tolist() for scores in found[1:7]] == [[np.float32(2 / 3), np.float32(1 / 3)]] * 6
    assert found[7][1].tolist() == [np.float32(2 / 3)]


async def test_one_that_is_cancelled_does_not_take_the_others_with_it(inner):
    """The work goes on as long as anybody waits for it."""
    cached = CachedScorer(inner)
    inner.gate.clear()
    one, other = (asyncio.create_task(cached.ascore("q", ["a"])) for _ in range(2))
    await asyncio.to_thread(waiting_on, cached, 2)
    one.cancel()
    await asyncio.wait([one])
    inner.gate.set()

    assert (await other).tolist() == [np.float32(1 / 3)]
    assert inner.seen == [("q", "a")]


async def test_what_nobody_waits_for_is_given_up_and_computed_anew_when_asked_for(inner):
    cached = CachedScorer(inner)
    inner.gate.clear()
    task = asyncio.create_task(cached.ascore("q", ["a"]))
    await asyncio.to_thread(waiting_on, cached, 1)
    await asyncio.to_thread(inner.begun.wait, 30)
    task.cancel()
    await asyncio.wait([task])

    assert not cached._flights
    inner.gate.set()
    assert (await cached.ascore("q", ["a"])).tolist() == [np.float32(1 / 3)]


def test_an_error_reaches_all_who_wait_and_is_not_kept(inner):
    cached, inner.error = CachedScorer(inner), ScorerError("broken")
    inner.gate.clear()
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(cached.score, "q", ["a"]) for _ in range(2)]
        waiting_on(cached, 2)
        inner.gate.set()
        for call in calls:
            with pytest.raises(ScorerError, match="broken"):
                call.result(30)
    inner.error = None

    assert cached.score("q", ["a"]).tolist() == [np.float32(1 / 3)]


def test_a_document_that_fails_is_tried_again_and_the_others_are_kept():
    table = TableScorer({"a": 1.0})
    cached = CachedScorer(table)
    for _ in range(2):
        found = cached.score_details("q", ["a", "x"])
        assert (found.log_odds[0], list(found.errors)) == (1, [1])

    assert [texts for _, texts, _ in table.calls] == [["a", "x"], ["x"]]


async def test_a_prepared_request_computes_only_what_is_missing_once(inner):
    """As the server asks: in slices, at the same time, with a part already known."""
    cached = CachedScorer(inner)
    cached.score("q", ["bb"])
    texts = ["a", "bb", "ccc", "dddd"]
    one, other = [await cached.aprepare(ScoreRequest("q", texts)) for _ in range(2)]
    slices = await asyncio.gather(*(each.ascore(*at) for each in (one, other) for at in ((0, 3), (3, 4))))

    assert sorted(inner.seen) == [("q", "a"), ("q", "bb"), ("q", "ccc"), ("q", "dddd")]
    assert [len(scores.log_odds) for scores in slices] == [3, 1, 3, 1]
    assert slices[2].log_odds.tolist() == slices[0].log_odds.tolist() == inner.score("q", texts)[:3].tolist()


async def test_what_a_prepared_request_knew_stays_known_when_others_push_it_out(inner):
    cached = CachedScorer(inner, cache=1)
    cached.score("q", ["bb"])
    prepared = await cached.aprepare(ScoreRequest("q", ["bb", "a"]))
    cached.score("q", ["pushed"])

    assert (await prepared.ascore(0, 2)).log_odds.tolist() == inner.score("q", ["bb", "a"]).tolist()
    assert inner.seen.count(("q", "bb")) == 2  # before, and by this test's own question


def test_a_cache_that_fails_keeps_nobody_waiting(inner, monkeypatch, caplog):
    """The scores are right, whatever becomes of the file; the next call computes them again."""
    cached = CachedScorer(inner)
    monkeypatch.setattr(cached.cache, "put", lambda scores: 1 / 0)

    assert [cached.score("q", ["a"]).tolist() for _ in range(2)] == [[np.float32(1 / 3)]] * 2
    assert not cached._flights
    assert "cannot keep scores" in caplog.text


async def test_a_cancelled_slice_leaves_the_work_to_who_waits_for_it(inner):
    cached = CachedScorer(inner)
    one, other = [await cached.aprepare(ScoreRequest("q", ["a"])) for _ in range(2)]
    inner.gate.clear()
    first, second = (asyncio.create_task(each.ascore(0, 1)) for each in (one, other))
    await asyncio.to_thread(waiting_on, cached, 2)
    first.cancel()
    await asyncio.wait([first])
    inner.gate.set()

    assert (await second).log_odds.tolist() == [np.float32(1 / 3)]
    assert inner.seen == [("q", "a")]


def test_memory_is_bounded_and_the_one_used_last_stays():
    cache, keys = ScoreCache(size=2), [bytes([i]) * 24 for i in range(3)]
    cache.put({keys[0]: KeptScore(0.0), keys[1]: KeptScore(1.0)})
    cache.get(keys[:1])
    cache.put({keys[2]: KeptScore(2.0)})

    assert len(cache) == 2
    assert set(cache.get(keys)) == {keys[0], keys[2]}


def test_a_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_rerank.scorers.score_cache._FILE_SIZE", 10)
    keys = [bytes([i]) * 24 for i in range(30)]
    with ScoreCache(tmp_path / "s.db") as cache:
        for key in keys:
            cache.put({key: KeptScore(1.0)})
    with ScoreCache(tmp_path / "s.db") as cache:
        assert set(cache.get(keys)) == set(keys[-10:])


def test_a_file_outlives_the_process_and_holds_no_text(tmp_path, inner):
    for _ in range(2):
        with ScoreCache(tmp_path / "s.db") as cache:
            CachedScorer(inner, cache=cache).score("a secret query", ["a secret text"])

    assert len(inner.seen) == 1
    assert b"secret" not in (tmp_path / "s.db").read_bytes()


def test_no_flipped_byte_is_ever_believed(tmp_path, inner):
    """Each byte of a file flipped in turn, some of them: the scores are right, whatever becomes of the file."""
    path = tmp_path / "s.db"
    with ScoreCache(path) as cache:
        expected = CachedScorer(inner, cache=cache).score("q", ["a" * i for i in range(1, 40)])
    whole = path.read_bytes()
    for place in [*range(72, 400, 13), *range(4096, len(whole), 211)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with ScoreCache(path) as cache:
            found = CachedScorer(inner, cache=cache).score("q", ["a" * i for i in range(1, 40)])
        assert found.tolist() == expected.tolist()


def test_a_truncated_file_is_dropped_with_a_warning(tmp_path, inner, caplog):
    path = tmp_path / "s.db"
    with ScoreCache(path) as cache:
        CachedScorer(inner, cache=cache).score("q", ["a"])
    path.write_bytes(path.read_bytes()[:5000])
    with ScoreCache(path) as cache:
        CachedScorer(inner, cache=cache).score("q", ["a"])
    with ScoreCache(path) as cache:
        assert len(cache.get([score_key("gated", None, "q", "a")])) == 1

    assert "is damaged" in caplog.text


def test_a_damaged_file_that_cannot_be_made_anew_leaves_the_memory(tmp_path, inner, monkeypatch, caplog):
    path = tmp_path / "s.db"
    with ScoreCache(path) as cache:
        CachedScorer(inner, cache=cache).score("q", ["a"])
        path.write_bytes(bytes(path.stat().st_size))
        monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only")))
        for _ in range(2):
            assert CachedScorer(inner, cache=cache).score("q", ["bb"]).tolist() == [np.float32(2 / 3)]

    assert len(inner.seen) == 2
    assert "Scores stay in memory" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="a file in use cannot be deleted")
def test_a_deleted_file_is_made_again(tmp_path):
    path, keys = tmp_path / "s.db", [bytes([i]) * 24 for i in range(3)]
    with ScoreCache(path) as cache:
        for key in keys:
            cache.put({key: KeptScore(1.0)})
            if key == keys[0]:
                path.unlink()
    with ScoreCache(path) as cache:
        assert list(cache.get(keys)) == keys[2:]


def test_a_row_of_nothing_is_no_score(tmp_path):
    with ScoreCache(tmp_path / "s.db") as cache, sqlite3.connect(tmp_path / "s.db") as db:
        db.executemany("INSERT INTO kept_scores (key, checksum) VALUES (?, ?)", [(b"a", b""), (b"b", None)])
        db.commit()
        assert cache.get([b"a", b"b"]) == {}


@pytest.mark.parametrize("content", [b"certainly no database " * 20, b"short"])
def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InvalidInputError, match="is no score cache"):
        ScoreCache(tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == content


def test_a_database_of_others_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "x") as db:
        db.execute("CREATE TABLE customers (name)")
    with pytest.raises(InvalidInputError, match="is no score cache"):
        load_scorer("pocket", cache=tmp_path / "x")


def test_a_file_that_another_process_holds_costs_only_the_hits(tmp_path, inner, monkeypatch, caplog):
    monkeypatch.setattr("qwen_rerank.scorers.score_cache._PATIENCE_S", 0.05)
    with ScoreCache(tmp_path / "s.db") as cache, sqlite3.connect(tmp_path / "s.db") as db:
        db.execute("BEGIN EXCLUSIVE")
        assert CachedScorer(inner, cache=cache).score("q", ["a"]).tolist() == [np.float32(1 / 3)]
        db.rollback()

    assert "cannot be used now" in caplog.text


def test_a_scorer_without_a_fingerprint_is_refused():
    class Nameless:
        name = "mine"

        def score(self, query, documents):
            return [0.0] * len(documents)

    for scorer in (Nameless(), as_scorer(Nameless())):
        with pytest.raises(InvalidInputError, match="mine has no fingerprint"):
            CachedScorer(scorer)


def test_many_threads_get_exactly_their_own_scores(inner):
    cached = CachedScorer(inner, cache=50)  # less than there is
    texts = [["x" * ((i * j) % 90) for j in range(1, 12)] for i in range(64)]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda each: cached.score("q", each), texts))

    assert [scores.tolist() for scores in found] == [inner.score("q", each).tolist() for each in texts]
    assert not cached._flights


async def test_many_coroutines_get_exactly_their_own_scores_while_some_are_cancelled(inner):
    cached = CachedScorer(inner, cache=50)  # less than there is
    texts = [["x" * ((i * j) % 90) for j in range(1, 12)] for i in range(64)]
    tasks = [asyncio.create_task(cached.ascore("q", each)) for each in texts]
    for task in tasks[::5]:
        asyncio.get_running_loop().call_soon(task.cancel)
    found = await asyncio.gather(*tasks, return_exceptions=True)

    kept = [i for i in range(64) if i % 5]
    assert [found[i].tolist() for i in kept] == [inner.score("q", texts[i]).tolist() for i in kept]
    assert not cached._flights


def test_two_that_share_a_file_share_its_scores(tmp_path, inner):
    with ScoreCache(tmp_path / "s.db") as one, ScoreCache(tmp_path / "s.db") as other:
        first = CachedScorer(inner, cache=one).score("q", TEXTS)
        second = CachedScorer(inner, cache=other).score("q", TEXTS)

    assert first.tolist() == second.tolist()
    assert len(inner.seen) == len(TEXTS)


def test_a_command_line_names_a_cache_by_a_file_or_a_number(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    assert [cache_named(text) for text in (None, "100", "~/s.db")] == [None, 100, tmp_path / "s.db"]
    for text in ("0", "-5", "100,000"):
        with pytest.raises(InvalidInputError, match="how many scores"):
            cache_named(text)


@pytest.mark.parametrize("odd", [["high"], {"a": 1}, [[1, 2], [3]]])
def test_a_scorer_that_gives_no_numbers_is_told_so(odd):
    class Odd:
        name = "odd"

        def score(self, query, documents):
            return odd

    with pytest.raises(ScorerError, match="odd returned"):
        as_scorer(Odd()).score("q", ["a"])


def test_load_scorer_takes_a_cache():
    with pytest.raises(InvalidInputError, match="cache must be an integer of at least 1"):
        load_scorer("pocket", cache=0)
    cached = load_scorer("pocket", device="cpu", dtype="float32", max_length=300, cache=10)
    first, second = (cached.score("apple", ["an apple", "a pear"]) for _ in range(2))

    assert first.tolist() == second.tolist()
    assert cached.cache.hits == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_connection_of_its_own(tmp_path):
    key = b"k" * 24
    with ScoreCache(tmp_path / "s.db") as cache:
        cache.put({key: KeptScore(1.0)})
        child = os.fork()
        if child == 0:
            cache.put({b"c" * 24: KeptScore(2.0)})
            os._exit(0 if cache._parents is not cache._db else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert cache.get([b"c" * 24]) == {b"c" * 24: KeptScore(2.0)}
