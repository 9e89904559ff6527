"""What every scorer gets from its base, and what is made of other people's scorers."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import numpy as np
import pytest

from qwen_rerank import DetailedScorer, Reranker, Scorer, Scores, TwoStageRetriever
from qwen_rerank.errors import DocumentScoringError, InvalidInputError, InvalidTextError, ScorerError
from qwen_rerank.lexical import BM25Index
from qwen_rerank.scorers.adapted import as_scorer
from qwen_rerank.scorers.base import BaseScorer, Call, ScoreRequest
from qwen_rerank.testing import OverlapScorer, TableScorer
from qwen_rerank.types import Document


class Minimal:
    """The least that scores: the share of documents' letters that are `a`."""

    name = "minimal"

    def score(self, query, documents):
        return [text.count("a") / max(1, len(text)) for text in documents]


def test_a_base_scorer_is_both_kinds_of_scorer():
    assert isinstance(OverlapScorer(), Scorer)
    assert isinstance(OverlapScorer(), DetailedScorer)


def test_a_class_with_a_name_and_score_works_everywhere():
    found = Reranker(Minimal()).rerank("q", ["bbb", "aab", "aaa"])
    stages = TwoStageRetriever(BM25Index([Document("1", "cat aaa"), Document("2", "cat")]), Reranker(Minimal()))

    assert [hit.document.text for hit in found] == ["aaa", "aab", "bbb"]
    assert [hit.document.id for hit in stages.retrieve("cat")] == ["1", "2"]
    assert as_scorer(Minimal()).fingerprint.endswith("Minimal:minimal")


async def test_its_asynchronous_half_and_many_queries_are_made_for_it():
    scorer = as_scorer(Minimal())

    assert (await scorer.ascore("q", ["a", "b"])).tolist() == [1, 0]
    assert [scores.tolist() for scores in scorer.score_many(["p", "q"], [["a"], []])] == [[1], []]


def test_an_instruction_is_refused_where_nobody_reads_it():
    with pytest.raises(InvalidInputError, match=r"minimal takes no instruction \('find it'\)"):
        Reranker(Minimal(), instruction="find it").rerank("q", ["a"])


@pytest.mark.parametrize("wrong", [3, None, object(), Minimal, ["a"]])
def test_what_cannot_score_is_refused_with_what_would(wrong):
    with pytest.raises(InvalidInputError, match="scorer must be a model's name or have `name` and `score"):
        Reranker(wrong)


def test_a_subclass_with_a_score_of_its_own_is_taken_at_its_word():
    class Doubled(TableScorer):
        def score(self, query, documents, *, instruction=None):
            return 2 * super().score(query, documents, instruction=instruction)

    assert [hit.log_odds for hit in Reranker(Doubled({"a": 1.5})).rerank("q", ["a"])] == [3.0]


def test_details_tell_tokens_kept_characters_and_errors():
    details = OverlapScorer(max_words=2).score_details("cat", ["a cat", "one two three", "\ud800", "a cat"])

    assert details.log_odds.tolist()[:2] == [4.0, -4.0]
    assert details.tokens.tolist() == [2, 2, -1, 2]
    assert details.kept_chars.tolist() == [5, 7, -1, 5]
    assert {place: type(error) for place, error in details.errors.items()} == {2: InvalidTextError}
    assert details.log_odds.dtype == np.float32
    assert details.tokens.dtype == details.kept_chars.dtype == np.int32


def test_arrays_refuse_what_details_report():
    with pytest.raises(InvalidTextError, match=r"documents\[1\] holds a lone surrogate"):
        OverlapScorer().score("cat", ["a", "\ud800"])
    with pytest.raises(DocumentScoringError, match=r"documents\[1\]"):
        TableScorer({"a": 1.0}).score("q", ["a", "x"])


def test_equal_texts_and_equal_queries_are_computed_once():
    scorer = TableScorer({"a": 1.0, "b": 2.0, "c": 3.0})
    found = scorer.score_many(["p", "q", "p"], [["a", "b", "a"], [], ["c", "b"]])

    assert scorer.calls == [("p", ["a", "b", "c"], None)]
    assert [scores.tolist() for scores in found] == [[1, 2, 1], [], [3, 2]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(np.zeros(3), r"shape \(3,\) for 2 documents", id="too many"),
        pytest.param(np.zeros((2, 1)), r"shape \(2, 1\) for 2 documents", id="a column"),
    ],
)
def test_a_wrong_answer_is_refused(answer, message):
    class Wrong(Minimal):
        def score(self, query, documents):
            return answer

    with pytest.raises(ScorerError, match=message):
        as_scorer(Wrong()).score("q", ["a", "b"])


class Waiting(BaseScorer):
    """Never answers."""

    name = fingerprint = "waiting"

    def __init__(self):
        self.calls: list[Call] = []
        self.futures: list[Future[list[Scores]]] = []

    def _begin(self, call):
        self.calls.append(call)
        self.futures.append(Future())
        return self.futures[-1]


async def test_a_cancelled_call_is_told_to_the_scorer():
    scorer = Waiting()
    task = asyncio.create_task(scorer.ascore("q", ["a"]))
    while not scorer.futures:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert scorer.calls[0].cancelled


def test_what_is_registered_after_the_cancellation_is_undone_at_once():
    call, undone = Call([ScoreRequest("q", ["a"])]), []
    call.cancel()
    call.on_cancel(lambda: undone.append(1))

    assert undone == [1]


async def test_prepared_requests_are_scored_in_slices():
    prepared = OverlapScorer().prepare(ScoreRequest("cat", ["a cat", "a dog", "cat cat"]))
    parts = [await prepared.ascore(start, stop) for start, stop in ((0, 2), (2, 3))]

    assert [part.log_odds.tolist() for part in parts] == [[4.0, -4.0], [4.0]]
    assert prepared.tokens.tolist() == [-1, -1, -1]
