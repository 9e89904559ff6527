"""What a reranker makes of documents that are longer than their room."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen_rerank import Reranker
from qwen_rerank.errors import (
    DocumentScoringError,
    DocumentTooLongError,
    InvalidInputError,
    QueryTooLongError,
)
from qwen_rerank.testing import OverlapScorer, TableScorer
from qwen_rerank.types import Fit


def texts(hits):
    return [hit.document.text for hit in hits]


class CountingScorer:
    """Notes which texts are tokenized by `fit`; a scorer that is no class of ours."""

    name = "counting"

    def __init__(self, *, max_words=8):
        self.fitted = []
        self._overlap = OverlapScorer(max_words=max_words)

    def score(self, query, documents):
        return self._overlap.score(query, documents)

    def fit(self, query, texts):
        self.fitted += texts
        return self._overlap.fit(query, texts)


class FittingScorer(TableScorer):
    """A table of log-odds that measures texts as another scorer does."""

    def __init__(self, table, measure):
        super().__init__(table)
        self._measure = measure


LONG = "filler words here. " * 20 + "the red cat sleeps. " + "more filler again. " * 20


def test_windows_find_what_a_cut_would_lose():
    cut, whole = (Reranker(OverlapScorer(max_words=12), long_documents=how) for how in ("truncate", "windows"))
    [lost], [found] = cut.rerank("red cat", [LONG]), whole.rerank("red cat", [LONG])

    assert (lost.log_odds, lost.truncated, lost.windows) == (-4.0, True, 1)
    assert (found.log_odds, found.truncated) == (4.0, False)
    assert found.windows > 5
    assert "red cat" in LONG[slice(*found.best_window)]


def test_a_cut_document_says_which_part_was_read():
    [hit] = Reranker(OverlapScorer(max_words=3)).rerank("q", ["one two three four"])

    assert (hit.truncated, hit.best_window) == (True, (0, len("one two three")))


def test_a_document_that_fits_is_one_window():
    [hit] = Reranker(OverlapScorer(max_words=12), long_documents="windows").rerank("red", ["a red cat"])

    assert (hit.truncated, hit.windows, hit.best_window) == (False, 1, (0, 9))


def test_a_cut_is_left_to_the_scorer():
    """It cuts by tokens; a text cut here could be tokenized differently."""

    class Cutting:
        name = "cutting"

        def score(self, query, documents):
            assert documents == [LONG]
            return np.float32([1.0])

        def fit(self, query, texts):
            return [Fit(900, 500, 5) for _ in texts]

    [hit] = Reranker(Cutting()).rerank("q", [LONG])
    assert (hit.truncated, hit.best_window) == (True, (0, 5))


def test_an_over_long_document_fails_alone():
    reranker = Reranker(OverlapScorer(max_words=5), long_documents="error", on_error="last")
    hits = reranker.rerank("cat", [LONG, "a dog", "a cat"])

    assert texts(hits) == ["a cat", "a dog", LONG]
    assert isinstance(hits[2].error, DocumentTooLongError)
    with pytest.raises(DocumentScoringError, match="room beside the query is 5") as raised:
        replace(reranker, on_error="raise").rerank("cat", [LONG, "a dog", "a cat"])
    np.testing.assert_array_equal(raised.value.scores, np.float32([np.nan, -4, 4]))


@pytest.mark.parametrize(
    ("aggregate", "log_odds", "windows"), [("max", 4.0, 2), ("mean", 0.0, 2), ("topk-mean", 0.0, 2), ("first", -4.0, 1)]
)
def test_windows_are_aggregated_on_the_log_odds(aggregate, log_odds, windows):
    """Of "first", the other windows are not scored, and the result says that they were left out."""
    reranker = Reranker(OverlapScorer(max_words=6), long_documents="windows", aggregate=aggregate, window_overlap=0.0)
    [hit] = reranker.rerank("cat", ["a dog is here. a cat is here. "])

    assert (hit.windows, hit.log_odds, hit.truncated) == (windows, log_odds, windows == 1)


def test_one_failed_window_fails_its_document():
    words = "one two three four five six"
    table = {"one two ": 1.0, "three ": 1.0, "four ": 1.0, "seven": 0.0}
    scorer = FittingScorer(table, OverlapScorer(max_words=2).measure)
    hits = Reranker(scorer, long_documents="windows", window_overlap=0.0, on_error="last").rerank("q", [words, "seven"])

    assert texts(hits) == ["seven", words]
    assert hits[1].error is not None


def test_without_a_tokenizer_nobody_can_tell_what_was_cut():
    [hit] = Reranker(TableScorer({"a": 0.5})).rerank("q", ["a"])

    assert (hit.truncated, hit.windows, hit.best_window) == (False, 1, None)
    for how in ("windows", "error"):
        with pytest.raises(InvalidInputError, match="table has no tokenizer"):
            Reranker(TableScorer({"a": 0.5}), long_documents=how).rerank("q", ["a"])


def test_plainly_short_documents_are_not_tokenized_to_be_measured():
    scorer = CountingScorer(max_words=30)
    Reranker(scorer, long_documents="error").rerank("cat", ["a cat", "a dog", "one, two; " * 5])

    assert scorer.fitted[:2] == ["", "one, two; " * 5]


def test_a_query_that_is_too_long_is_an_error_of_the_call():
    def refuse(query, texts, instruction):
        raise QueryTooLongError("the query has 9000 tokens")

    with pytest.raises(QueryTooLongError, match="9000"):
        Reranker(FittingScorer({}, refuse), long_documents="windows", on_error="last").rerank("q", ["a"])
