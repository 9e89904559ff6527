"""One scoring pass gives every depth, and a pass that broke off goes on."""

from __future__ import annotations

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.cache import ScoreCache
from qwen_rerank.evaluation.experiment import fuse, recall, rerank_run, score_run, time_searches
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.pipeline import TwoStageRetriever
from qwen_rerank.reranker import Reranker
from qwen_rerank.testing import OverlapScorer


class CountingScorer(OverlapScorer):
    """Counts the documents it scores."""

    def __init__(self):
        super().__init__()
        self.n_documents = 0

    def score(self, query, documents, *, instruction=None):
        self.n_documents += len(documents)
        return super().score(query, documents, instruction=instruction)


def test_both_stages_of_a_collection(collection, first_stage):
    found = recall(first_stage, collection, top_k=8)
    scores = score_run(Reranker(OverlapScorer()), collection, found.run, depth=8)

    assert measure(found.run, collection.qrels, ["RR"]).means["RR"] < 0.5
    assert measure(rerank_run(found.run, scores, depth=8), collection.qrels, ["RR"]).means["RR"] == 1.0


def test_a_shallow_depth_leaves_the_rest_as_the_first_stage_had_it(collection, first_stage):
    found = recall(first_stage, collection, top_k=8)
    scores = score_run(Reranker(OverlapScorer()), collection, found.run, depth=8)

    reranked = rerank_run(found.run, scores, depth=3)

    assert [doc for doc, _ in reranked["q2"]] == ["d2", "d0", "d1", "d3", "d4", "d5", "d6", "d7"]
    assert [doc for doc, _ in reranked["q7"]] == [doc for doc, _ in found.run["q7"]]


def test_a_depth_that_was_not_scored_is_refused(collection, first_stage):
    found = recall(first_stage, collection, top_k=8)
    scores = score_run(Reranker(OverlapScorer()), collection, found.run, depth=2)

    with pytest.raises(InvalidInputError, match="was not scored"):
        rerank_run(found.run, scores, depth=3)


def test_known_scores_are_not_computed_again(collection, first_stage, tmp_path):
    run = recall(first_stage, collection, top_k=8).run
    scorer = CountingScorer()
    with ScoreCache(tmp_path / "scores.db") as cache:
        first = score_run(Reranker(scorer), collection, run, depth=4, cache=cache)
    with ScoreCache(tmp_path / "scores.db") as cache:
        second = score_run(Reranker(scorer), collection, run, depth=5, cache=cache)

    assert scorer.n_documents == 8 * 5
    assert all(second[query][doc] == value for query, known in first.items() for doc, value in known.items())


def test_another_instruction_is_another_score(collection, first_stage, tmp_path):
    run = recall(first_stage, collection, top_k=8).run
    scorer = CountingScorer()
    with ScoreCache(tmp_path / "scores.db") as cache:
        for instruction in (None, "Find the paint"):
            score_run(Reranker(scorer, instruction=instruction), collection, run, depth=2, cache=cache)

    assert scorer.n_documents == 8 * 2 * 2


def test_a_cache_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.db").write_text("certainly no database, and long enough to be looked at " * 10)

    with pytest.raises(InvalidInputError, match="score cache"):
        ScoreCache(tmp_path / "x.db")


def test_a_run_over_another_corpus_is_refused(collection):
    with pytest.raises(InvalidInputError, match="'zzz'"):
        score_run(Reranker(OverlapScorer()), collection, {"q0": [("zzz", 1.0)]}, depth=1)


def test_fusion_puts_first_what_both_have_first(collection):
    runs = [{"q0": [("d1", 2.0), ("d0", 1.0)]}, {"q0": [("d1", 9.0), ("d3", 8.0)]}]

    assert fuse(runs, collection, top_k=2)["q0"][0][0] == "d1"


def test_timing_searches_anew_twice_for_every_query_and_takes_the_faster(collection, first_stage):
    scorer = CountingScorer()
    retriever = TwoStageRetriever(first_stage, Reranker(scorer), top_k=3)

    seconds = time_searches(retriever, collection, n_queries=4, name="time")

    assert seconds.shape == (4,)
    assert scorer.n_documents == 3 * (4 * 2 + 1)


def test_one_slow_call_is_not_taken_for_the_settings_time(collection, first_stage, monkeypatch):
    durations = iter([1.0, 9.0, 2.0, 3.0, 2.0])  # the warm-up, then two calls of each query
    clock = [0.0]

    class Timed(CountingScorer):
        def score(self, query, documents, *, instruction=None):
            clock[0] += next(durations)
            return super().score(query, documents, instruction=instruction)

    monkeypatch.setattr("qwen_rerank.evaluation.experiment.time.perf_counter", lambda: clock[0])
    retriever = TwoStageRetriever(first_stage, Reranker(Timed()))

    assert time_searches(retriever, collection, n_queries=2, name="time").tolist() == [2.0, 2.0]


def test_what_is_scored_is_kept_a_batch_at_a_time(collection, first_stage, tmp_path, monkeypatch):
    """A pass that breaks off in the middle of a query has lost no more than one batch."""
    monkeypatch.setattr("qwen_rerank.evaluation.experiment._DOCUMENTS_A_CALL", 3)
    run = recall(first_stage, collection, top_k=8).run

    class Breaking(CountingScorer):
        def score(self, query, documents, *, instruction=None):
            if self.n_documents == 6:
                self.n_documents = 0
                raise KeyboardInterrupt
            return super().score(query, documents, instruction=instruction)

    scorer = Breaking()
    with ScoreCache(tmp_path / "scores.db") as cache:
        with pytest.raises(KeyboardInterrupt):
            score_run(Reranker(scorer), collection, run, depth=8, cache=cache)
        monkeypatch.setattr(Breaking, "score", CountingScorer.score)
        score_run(Reranker(scorer), collection, run, depth=8, cache=cache)

    assert scorer.n_documents == 8 * 8 - 6


def test_long_documents_make_small_batches(collection, first_stage, monkeypatch):
    monkeypatch.setattr("qwen_rerank.evaluation.experiment._CHARS_A_CALL", 20)
    run = recall(first_stage, collection, top_k=8).run
    calls = []

    class Watching(CountingScorer):
        def score(self, query, documents, *, instruction=None):
            calls.append(len(documents))
            return super().score(query, documents, instruction=instruction)

    score_run(Reranker(Watching()), collection, run, depth=8)

    assert max(calls) <= 3
    assert sum(calls) == 64


def test_progress_shows_without_a_terminal(collection, first_stage, monkeypatch, caplog):
    monkeypatch.setattr("qwen_rerank.evaluation.experiment._DOCUMENTS_A_CALL", 16)
    monkeypatch.setattr("qwen_rerank.evaluation.experiment._REPORT_S", 0.0)
    run = recall(first_stage, collection, top_k=8).run

    with caplog.at_level("INFO", "qwen_rerank.evaluation"):
        score_run(Reranker(OverlapScorer()), collection, run, depth=8, name="bm25 → overlap")

    assert "bm25 → overlap: 16 of 64 documents scored, about" in caplog.text
