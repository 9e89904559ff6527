"""What a reranker promises, whatever scores for it."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_rerank import Calibration, Candidate, Document, Reranker
from qwen_rerank.errors import (
    CalibrationMismatchError,
    DocumentScoringError,
    InvalidInputError,
    InvalidTextError,
    NonFiniteScoreError,
    ScorerError,
)
from qwen_rerank.testing import OverlapScorer, TableScorer

LONG = "filler words here. " * 20 + "the red cat sleeps. " + "more filler again. " * 20
TABLE = {"a": 0.5, "b": 0.9, "c": 0.5, "d": -2.0}


def texts(hits):
    return [hit.document.text for hit in hits]


class FixedScorer:
    """Returns what it was given, right or wrong; the least that scores."""

    name = "fixed"

    def __init__(self, scores):
        self.scores = np.array(scores, dtype=np.float32)

    def score(self, query, documents):
        return self.scores


def test_equal_scores_keep_first_stage_order():
    """A scorer that cannot tell two documents apart leaves them as the first stage had them."""
    hits = Reranker(TableScorer(TABLE)).rerank("q", ["a", "b", "c"])

    assert texts(hits) == ["b", "a", "c"]
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert [hit.index for hit in hits] == [1, 0, 2]


@given(st.lists(st.sampled_from([-3.0, 0.0, 0.25, 7.0]), max_size=8))
def test_the_order_is_that_of_a_stable_sort(scores):
    table = {str(i): score for i, score in enumerate(scores)}
    hits = Reranker(TableScorer(table)).rerank("q", list(table))

    assert [hit.index for hit in hits] == sorted(range(len(scores)), key=lambda i: -scores[i])


def test_strings_documents_and_candidates_can_be_mixed():
    document = Document("id-b", "b", {"lang": "zh"})
    hits = Reranker(TableScorer(TABLE)).rerank("q", ["a", Candidate(document, 12.5, 7), Document("id-d", "d")])

    assert hits[0].document is document
    assert [hit.first_stage_score for hit in hits] == [12.5, None, None]


def test_the_score_is_the_sigmoid_of_the_log_odds_as_a_plain_float():
    [hit] = Reranker(TableScorer(TABLE)).rerank("q", ["d"])

    assert type(hit.score) is type(hit.log_odds) is float
    assert hit.log_odds == -2.0
    assert hit.score == pytest.approx(1 / (1 + math.exp(2)))


def test_no_candidates_give_no_result_and_do_not_touch_the_scorer():
    scorer = TableScorer({})

    assert Reranker(scorer, threshold=0.5).rerank("q", []) == []
    assert scorer.calls == []


def test_top_n_above_the_count_is_clamped_and_a_calls_own_comes_first():
    reranker = Reranker(TableScorer(TABLE), top_n=2)

    assert texts(reranker.rerank("q", list("abcd"))) == ["b", "a"]
    assert texts(reranker.rerank("q", list("abcd"), top_n=99)) == ["b", "a", "c", "d"]


def test_a_threshold_keeps_what_reaches_it():
    assert texts(Reranker(TableScorer({"a": 0.0, "b": -0.1}), threshold=0.5).rerank("q", ["a", "b"])) == ["a"]


def test_a_document_that_occurs_twice_is_scored_once_and_ranked_twice():
    scorer = TableScorer(TABLE)
    hits = Reranker(scorer).rerank("q", ["d", "b", "d"])

    assert scorer.calls == [("q", ["d", "b"], None)]
    assert [(hit.index, hit.log_odds) for hit in hits[1:]] == [(0, -2.0), (2, -2.0)]


def test_instructions_reach_the_scorer_and_a_calls_own_comes_first():
    scorer = TableScorer(TABLE)
    reranker = Reranker(scorer, instruction="by default")
    reranker.rerank("q", ["a"])
    reranker.rerank("q", ["a"], instruction="this time")

    assert [call[2] for call in scorer.calls] == ["by default", "this time"]


# Failing documents


def test_a_failing_document_raises_with_its_place_and_the_others_scores():
    with pytest.raises(
        DocumentScoringError, match=r"1 of 4 documents .* documents\[2\].*'x' is not in the table"
    ) as raised:
        Reranker(TableScorer(TABLE)).rerank("q", ["a", "a", "x", "b"])

    assert list(raised.value.failed) == [2]
    np.testing.assert_array_equal(raised.value.scores, np.float32([0.5, 0.5, np.nan, 0.9]))


def test_failing_documents_come_last_without_a_score(caplog):
    """They keep their order, no threshold drops them, and the log names them."""
    reranker = Reranker(TableScorer(TABLE), on_error="last", threshold=0.5)
    hits = reranker.rerank("q", ["x", "d", "a", "y", "b"])

    assert texts(hits) == ["b", "a", "x", "y"]
    assert all(math.isnan(hit.score) and math.isnan(hit.log_odds) for hit in hits[2:])
    assert [type(hit.error) for hit in hits] == [type(None), type(None), ScorerError, ScorerError]
    assert "2 of 5 documents could not be scored" in caplog.text


def test_failing_documents_never_take_the_place_of_scored_ones():
    assert texts(Reranker(TableScorer(TABLE), on_error="last").rerank("q", ["x", "a", "b"], top_n=2)) == ["b", "a"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_fails_its_document_alone(bad):
    hits = Reranker(FixedScorer([bad, 1.0]), on_error="last").rerank("q", ["a", "b"])

    assert texts(hits) == ["b", "a"]
    assert isinstance(hits[1].error, NonFiniteScoreError)


def test_scores_of_the_wrong_shape_are_refused():
    with pytest.raises(ScorerError, match=r"fixed returned scores of shape \(1,\) for 2 documents; expected \(2,\)"):
        Reranker(FixedScorer([1.0])).rerank("q", ["a", "b"])


def test_a_broken_text_is_refused_or_fails_alone():
    scorer = TableScorer(TABLE)

    with pytest.raises(InvalidTextError, match=r"candidates\[1\] holds a lone surrogate"):
        Reranker(scorer).rerank("q", ["a", "\ud800"])
    assert scorer.calls == []
    hits = Reranker(scorer, on_error="last").rerank("q", ["\ud800", "a"])
    assert [type(hit.error) for hit in hits] == [type(None), InvalidTextError]


# Many queries, and waiting


@pytest.mark.parametrize("how", ["truncate", "windows"])
def test_many_queries_give_what_each_gives_alone(how):
    reranker = Reranker(OverlapScorer(max_words=6), long_documents=how)
    queries, lists = ["red cat", "dog", "fish"], [[LONG, "red"], [], ["a fish", LONG]]

    assert reranker.rerank_many(queries, lists) == [reranker.rerank(q, c) for q, c in zip(queries, lists, strict=True)]


def test_many_queries_are_scored_in_one_call():
    calls = []

    class Batching(FixedScorer):
        def score_many(self, queries, documents):
            calls.append((queries, documents))
            return [np.float32([1]), np.float32([2, 3])]

    Reranker(Batching([])).rerank_many(["p", "q", "r"], [["a"], [], ["b", "c"]])

    assert calls == [(["p", "r"], [["a"], ["b", "c"]])]


def test_a_failing_document_touches_its_own_query_alone():
    good, bad = Reranker(TableScorer(TABLE), on_error="last").rerank_many(["p", "q"], [["a", "b"], ["x", "a"]])

    assert texts(good) == ["b", "a"]
    assert texts(bad) == ["a", "x"]
    with pytest.raises(DocumentScoringError, match=r"documents\[0\]"):
        Reranker(TableScorer(TABLE)).rerank_many(["p", "q"], [["a", "b"], ["x", "a"]])


async def test_arerank_gives_what_rerank_gives():
    reranker = Reranker(OverlapScorer(max_words=6), long_documents="windows", threshold=0.3)

    assert await reranker.arerank("red cat", [LONG, "red", "b"]) == reranker.rerank("red cat", [LONG, "red", "b"])
    with pytest.raises(DocumentScoringError):
        await Reranker(TableScorer(TABLE)).arerank("q", ["x"])


async def test_the_event_loop_goes_on_while_documents_are_scored():
    """The scorer is held until the loop has run something else."""
    turned = threading.Event()

    class Held(FixedScorer):
        def score(self, query, documents):
            assert turned.wait(30)
            return self.scores

    task = asyncio.create_task(Reranker(Held([7])).arerank("q", ["a"]))
    await asyncio.sleep(0.01)
    turned.set()

    assert [hit.log_odds for hit in await task] == [7]


async def test_scoring_is_awaited_on_the_scorers_own_coroutine():
    class Awaited(FixedScorer):
        async def ascore(self, query, documents):
            return np.full(len(documents), 7, dtype=np.float32)

    scorer = Awaited([])
    assert [hit.log_odds for hit in await Reranker(scorer).arerank("q", ["a", "b"])] == [7, 7]


# Probabilities


def platt(reranker, *, a=1.0, b=0.0):
    return Calibration(kind="platt", fitted_for=reranker.calibration_key(), a=a, b=b)


def test_a_calibration_sets_probability_and_threshold_but_never_the_order():
    plain = Reranker(TableScorer(TABLE))
    reranker = replace(plain, calibration=platt(plain, a=2.0, b=-1.4), threshold=0.5)
    hits = reranker.rerank("q", list("abcd"))

    assert texts(hits) == ["b"]  # sigmoid(2 * 0.9 - 1.4) is above one half, sigmoid(2 * 0.5 - 1.4) below
    assert hits[0].score == pytest.approx(1 / (1 + math.exp(-0.4)))
    assert texts(replace(reranker, threshold=None).rerank("q", list("abcd"))) == texts(plain.rerank("q", list("abcd")))


def test_a_flat_calibration_keeps_the_order_of_the_log_odds():
    plain = Reranker(TableScorer(TABLE))
    flat = Calibration(kind="isotonic", fitted_for=plain.calibration_key(), x=(0.0,), y=(0.5,))

    assert texts(replace(plain, calibration=flat).rerank("q", list("dabc"))) == ["b", "a", "c", "d"]


def test_a_calibration_for_other_settings_is_refused_with_the_difference():
    calibration = platt(Reranker(OverlapScorer(max_words=8)))

    with pytest.raises(CalibrationMismatchError, match="long_documents was 'truncate' and is now 'windows'"):
        Reranker(OverlapScorer(max_words=8), long_documents="windows", calibration=calibration)
    with pytest.raises(CalibrationMismatchError, match="scorer was 'overlap-8' and is now 'overlap-9'"):
        Reranker(OverlapScorer(max_words=9), calibration=calibration)


def test_a_calibration_is_refused_for_another_instruction():
    plain = Reranker(TableScorer(TABLE), instruction="find it")
    reranker = replace(plain, calibration=platt(plain))

    assert reranker.rerank("q", ["a"], instruction="find it")
    with pytest.raises(CalibrationMismatchError, match="fitted for the instruction 'find it', not for 'find that'"):
        reranker.rerank("q", ["a"], instruction="find that")


def test_window_settings_belong_to_the_key_only_where_windows_are_read():
    def key(**settings):
        return Reranker(OverlapScorer(), **settings).calibration_key()

    assert key(aggregate="mean") == key(window_tokens=7) == key()
    assert key(long_documents="windows", aggregate="mean") != key(long_documents="windows")


def test_scores_that_are_no_probability_refuse_a_threshold_without_a_calibration():
    class Uncalibrated(TableScorer):
        calibrated = False

    scorer = Uncalibrated(TABLE)
    plain = Reranker(scorer)

    with pytest.raises(
        InvalidInputError, match=r"threshold \(0.6\) needs a probability, and the scores of table are none"
    ):
        Reranker(scorer, threshold=0.6)
    assert texts(replace(plain, threshold=0.6, calibration=platt(plain)).rerank("q", list("abd"))) == ["b", "a"]


def test_a_scorer_that_learns_it_from_its_server_is_refused_then():
    class Learning(FixedScorer):
        calibrated = True

        def score(self, query, documents):
            self.calibrated = False
            return self.scores

    reranker = Reranker(Learning([0.5]), threshold=0.6)
    with pytest.raises(InvalidInputError, match="needs a probability"):
        reranker.rerank("q", ["a"])


# Arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_n": 0}, "top_n must be an integer of at least 1, not 0"),
        ({"threshold": 1.5}, "threshold must be a probability"),
        ({"long_documents": "chop"}, "long_documents must be one of 'truncate', 'windows', 'error', not 'chop'"),
        ({"aggregate": "median"}, "aggregate must be one of"),
        ({"on_error": "ignore"}, "on_error must be one of"),
        ({"window_overlap": 0.5}, "window_overlap must be between 0 and 0.4, not 0.5"),
        ({"window_tokens": True}, "window_tokens must be an integer"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        Reranker(TableScorer({}), **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", ["a"]), "query is empty"),
        (("q", "abc"), r"candidates must be a list of strings, .*, not str; wrap one text as \[text\]\."),
        (("q", np.array(["a"])), r"candidates must be a list of strings, .*, not ndarray; give list\(…\) of it\."),
        (("q", ["a", None]), r"candidates\[1\] must be a string, a Document or a Candidate, not NoneType"),
        (("q", [Document("id", 3)]), r"candidates\[0\] must be a string, not int"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        Reranker(TableScorer({})).rerank(*arguments)


def test_every_query_needs_its_own_list():
    with pytest.raises(InvalidInputError, match="1 lists for 2 queries"):
        Reranker(TableScorer({})).rerank_many(["p", "q"], [["a"]])
