"""Several scorers behind one."""

import threading

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import Scorer
from qwen_rerank.scorers.pool import ScorerPool
from qwen_rerank.testing import OverlapScorer, TableScorer


def pool_of(n: int) -> tuple[ScorerPool, list[TableScorer]]:
    scorers = [TableScorer({"a": 1.0, "b": 2.0, "c": 3.0}, delay_s=0.01) for _ in range(n)]
    return ScorerPool(scorers), scorers


def test_a_pool_is_a_scorer():
    pool, _ = pool_of(2)

    assert isinstance(pool, Scorer)
    assert pool.score("q", ["b", "a"]).tolist() == [2, 1]


async def test_results_come_back_in_the_order_of_the_queries():
    pool, scorers = pool_of(3)
    queries, documents = ["q1", "q2", "q3", "q4"], [["a"], ["b", "a"], [], ["c"]]

    expected = [[1], [2, 1], [], [3]]
    assert [scores.tolist() for scores in pool.score_many(queries, documents)] == expected
    assert [scores.tolist() for scores in await pool.ascore_many(queries, documents)] == expected
    assert all(scorer.calls for scorer in scorers)


def test_equal_queries_are_answered_by_one_scorer():
    """Two devices may round differently, and equal texts in one call must score the same."""
    pool, scorers = pool_of(2)
    pool.score_many(["q", "q"], [["a"], ["a"]])

    assert sorted(len(scorer.calls) for scorer in scorers) == [0, 1]


def test_concurrent_calls_go_to_different_scorers():
    pool, scorers = pool_of(2)
    threads = [threading.Thread(target=pool.score, args=("q", ["a"] * 5)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(scorer.calls for scorer in scorers)


def test_scorers_that_would_disagree_are_refused():
    with pytest.raises(InvalidInputError, match="fingerprints are overlap-1, overlap-2"):
        ScorerPool([OverlapScorer(max_words=1), OverlapScorer(max_words=2)])


def test_an_empty_pool_is_refused():
    with pytest.raises(InvalidInputError, match="scorers is empty"):
        ScorerPool([])
