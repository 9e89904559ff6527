"""Answers that are accepted, and answers that are none."""

from __future__ import annotations

import json

import pytest

from qwen_rerank.errors import (
    BackendRejectedError,
    DocumentScoringError,
    ProtocolError,
)
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.http import HttpScorer
from tests.scorers.http import wire
from tests.scorers.http.calls import GOOD, llamacpp, replying, results
from tests.scorers.http.stub import Reply, serving

# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param(b"<html>Gateway</html>", "no JSON", id="HTML"),
        pytest.param(b"", "an empty body", id="empty"),
        pytest.param(b'{"results": [', "no JSON", id="cut JSON"),
        pytest.param(b"[" * 100_000, "nested deeper than 64", id="deep JSON"),
        pytest.param(b'{"results": [{"index": 0, "relevance_score": NaN}]}', "no JSON", id="NaN"),
        pytest.param(b'{"results": [{"index": 0, "relevance_score": -Infinity}]}', "no JSON", id="Infinity"),
        pytest.param(b"\xff\xfe\x00", "no JSON", id="no UTF-8"),
        pytest.param(b'"results"', "no list of results", id="a string"),
        pytest.param(b'{"results": null}', "no list of results", id="null"),
        pytest.param(b'{"results": [5]}', "a result that is no object", id="numbers"),
    ],
)
def test_an_answer_that_is_no_result_list_is_an_error(body, what):
    with (
        serving(replying(Reply(body=body))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(ProtocolError, match=what) as caught,
    ):
        scorer.score("q", ["d"])

    assert len(caught.value.excerpt) <= 200
    assert caught.value.excerpt.isprintable()


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(results((0, 0.5)), id="fewer"),
        pytest.param(results((0, 0.5), (1, 0.5), (2, 0.5)), id="more"),
        pytest.param(results((0, 0.5), (0, 0.5)), id="twice"),
        pytest.param(results((0, 0.5), (-1, 0.5)), id="negative"),
        pytest.param(results((0, 0.5), (2, 0.5)), id="out of range"),
        pytest.param(results((0, 0.5), (1.0, 0.5)), id="float"),
        pytest.param(results((0, 0.5), (True, 0.5)), id="bool"),
        pytest.param(results((0, 0.5), ("1", 0.5)), id="string"),
        pytest.param(results((0, 0.5), (None, 0.5)), id="null"),
    ],
)
def test_indices_must_be_each_place_once(reply):
    with serving(replying(reply)) as server, llamacpp(server.url) as scorer, pytest.raises(ProtocolError):
        scorer.score("q", ["a", "b"])


@pytest.mark.parametrize("score", [None, "0.5", [0.5], True, {}, 10**399, 1e999])
def test_scores_must_be_finite_numbers(score):
    body = json.dumps(results((0, 0.5), (1, score))).replace("Infinity", "1e999").encode()
    with (
        serving(replying(Reply(body=body))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(ProtocolError, match=r"no number|not finite"),
    ):
        scorer.score("q", ["a", "b"])


def test_a_number_of_more_digits_than_any_score_has_breaks_the_protocol():
    body = json.dumps(results((0, 10**400))).encode()
    with (
        serving(replying(Reply(body=body))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(ProtocolError, match="a number of more than 400 digits"),
    ):
        scorer.score("q", ["a"])


def test_unsorted_results_find_their_places():
    with serving(replying(results((2, 0.1), (0, 0.5), (1, 0.9)))) as server, llamacpp(server.url) as scorer:
        scores = scorer.score("q", ["a", "b", "c"])

    assert scores == pytest.approx([0.0, 2.1972246, -2.1972246])


def test_a_count_of_tokens_with_5000_digits_breaks_the_protocol():
    counted = Reply(value=[{"index": 0, "score": 0.5}], headers={"x-compute-tokens": "9" * 5000})
    with (
        serving(replying(counted)) as server,
        HttpScorer(server.url, dialect="tei") as scorer,
        pytest.raises(ProtocolError, match="a count of tokens with 5000 digits"),
    ):
        scorer.score("q", ["d"])


# --- other models, changed texts -------------------------------------------------------------------------------------


def test_another_models_name_is_a_warning(caplog):
    with serving(replying({"model": "other", **GOOD})) as server, llamacpp(server.url, model="mine") as scorer:
        scorer.score("q", ["d"])

    assert "scores of the model 'other' where 'mine' was asked for" in caplog.text


@pytest.mark.parametrize(
    "extra",
    [{"model": "other"}, {"results": [{"index": 0, "relevance_score": 0.5, "document": {"text": "changed"}}]}],
)
def test_strict_echo_makes_it_an_error(extra):
    with (
        serving(replying({**GOOD, **extra})) as server,
        llamacpp(server.url, model="mine", strict_echo=True) as scorer,
        pytest.raises(ProtocolError, match=r"the model 'other'|the text of document 0 changed"),
    ):
        scorer.score("q", ["d"])


# --- some requests fail ----------------------------------------------------------------------------------------------


def test_when_some_requests_fail_the_call_fails_and_carries_the_other_scores():
    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        texts = request.json["documents"]
        return Reply(501, {"message": "bad"}) if "d2" in texts else results(*((i, 0.5) for i in range(len(texts))))

    with (
        serving(handle) as server,
        llamacpp(server.url, max_batch=2) as scorer,
        pytest.raises(DocumentScoringError, match=r"2 of 6 documents.*documents\[2\]: BackendRejectedError") as caught,
    ):
        scorer.score("q", [f"d{i}" for i in range(6)])

    assert sorted(caught.value.failed) == [2, 3]
    assert list(caught.value.scores[[0, 1, 4, 5]]) == [0, 0, 0, 0]


def test_documents_of_failed_requests_come_last_in_their_first_order_and_are_marked():
    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        return Reply(501, {"message": "bad"}) if "d0" in request.json["documents"] else results((0, 0.2), (1, 0.9))

    with serving(handle) as server, llamacpp(server.url, max_batch=2) as scorer:
        hits = Reranker(scorer, on_error="last").rerank("q", [f"d{i}" for i in range(4)])

    assert [hit.index for hit in hits] == [3, 2, 0, 1]
    assert [hit.error is not None for hit in hits] == [False, False, True, True]


def test_stub_servers_find_a_wrong_field():
    """The stubs refuse fields that are not their server's, so the dialect tests can fail."""
    stub = wire.Tei()
    with (
        serving(stub.handle) as server,
        HttpScorer(server.url, dialect="cohere", model="m") as scorer,
        pytest.raises(BackendRejectedError),
    ):
        scorer.score("q", ["d"])
