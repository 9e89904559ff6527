"""Every server's own words: what is sent, what is read, what it means."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_rerank.errors import DocumentScoringError, InvalidInputError, ProtocolError
from qwen_rerank.scorers.http import HttpScorer
from qwen_rerank.scorers.http.dialects import DIALECTS
from tests.scorers.http import wire
from tests.scorers.http.stub import serving

DOCUMENTS = ["low -1.5", "high 2.5", "middle 0.5", "high 2.5"]
EXACT = ["vllm", "sglang", "tei", "llamacpp", "infinity", "xinference", "qwen-rerank"]
INSTRUCTED = ["vllm", "sglang", "xinference", "qwen-rerank"]


def expected(query: str, documents: list[str], instruction: str | None = None) -> np.ndarray:
    return np.array([wire.table(query, document, instruction) for document in documents])


@pytest.mark.parametrize("name", EXACT)
def test_every_server_gives_log_odds_in_input_order(name):
    stub = wire.SERVERS[name]()
    with serving(stub.handle) as server, HttpScorer(server.url, dialect=name, model=wire.MODEL) as scorer:
        scores = scorer.score("a query", DOCUMENTS)

    assert stub.problem is None
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected("a query", DOCUMENTS), atol=1e-5)


@pytest.mark.parametrize("name", ["cohere", "jina", "voyage"])
def test_hosted_services_order_documents_but_are_not_calibrated(name):
    stub = wire.SERVERS[name]()
    with serving(stub.handle) as server, HttpScorer(server.url, dialect=name, model="rerank-1") as scorer:
        scores = scorer.score("a query", DOCUMENTS)

    assert stub.problem is None
    assert not scorer.calibrated
    assert list(np.argsort(-scores, kind="stable")) == [1, 3, 2, 0]


@pytest.mark.parametrize("name", ["vllm", "sglang", "tei", "llamacpp", "infinity", "xinference", "qwen-rerank"])
def test_auto_asks_the_server_what_it_is(name):
    stub = wire.SERVERS[name]()
    with serving(stub.handle) as server, HttpScorer(server.url, model=wire.MODEL) as scorer:
        assert scorer.open().dialect.name == name


def test_auto_names_the_choices_when_the_server_does_not_say():
    with (
        serving(lambda request: wire.Reply(404, {"detail": "Not Found"})) as server,
        HttpScorer(server.url) as scorer,
        pytest.raises(InvalidInputError, match="name it with dialect=, one of 'vllm', 'sglang'"),
    ):
        scorer.score("q", ["d"])


@pytest.mark.parametrize(
    ("url", "dialect"),
    [("https://api.cohere.com", "cohere"), ("https://api.jina.ai", "jina"), ("https://api.voyageai.com", "voyage")],
)
def test_hosted_services_are_known_by_their_host(url, dialect):
    scorer = HttpScorer(url, model="m")

    assert scorer.name.startswith(dialect)
    assert not scorer.calibrated


def test_a_host_that_only_looks_like_a_hosted_service_is_none():
    assert HttpScorer("http://api.cohere.com.evil.example").calibrated


@pytest.mark.parametrize("name", INSTRUCTED)
def test_the_instruction_travels_where_it_can(name):
    stub = wire.SERVERS[name]()
    with serving(stub.handle) as server, HttpScorer(server.url, dialect=name, model=wire.MODEL) as scorer:
        scores = scorer.score("a query", DOCUMENTS, instruction="Find the number")

    np.testing.assert_allclose(scores, expected("a query", DOCUMENTS, "Find the number"), atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(DIALECTS) - set(INSTRUCTED)))
def test_an_instruction_is_an_error_where_it_would_be_ignored(name):
    with pytest.raises(InvalidInputError, match="cannot be given an instruction"):
        HttpScorer("http://127.0.0.1:9", dialect=name, model="m", instruction="Find the number")


@pytest.mark.parametrize("name", ["xinference", "cohere", "jina", "voyage"])
def test_a_model_must_be_named_where_the_server_needs_it(name):
    with pytest.raises(InvalidInputError, match="needs model="):
        HttpScorer("http://127.0.0.1:9", dialect=name)


def test_an_old_vllm_that_ignores_use_activation_is_found_out():
    stub = wire.Vllm(old=True)
    with serving(stub.handle) as server, HttpScorer(server.url, dialect="vllm") as scorer:
        np.testing.assert_allclose(scorer.score("q", DOCUMENTS), expected("q", DOCUMENTS), atol=1e-5)


def test_tei_gets_32_documents_at_a_time():
    stub = wire.Tei()
    documents = [f"document {i}" for i in range(70)]
    with serving(stub.handle) as server, HttpScorer(server.url, dialect="tei") as scorer:
        scores = scorer.score("q", documents)

    assert sorted(len(post.json["texts"]) for post in server.posts) == [6, 32, 32]
    np.testing.assert_allclose(scores, expected("q", documents), rtol=1e-6)


def test_a_smaller_limit_is_learnt_from_the_refusal():
    stub = wire.Tei()
    stub.limit = 8
    documents = [f"document {i}" for i in range(20)]
    with serving(stub.handle) as server, HttpScorer(server.url, dialect="tei") as scorer:
        scorer.score("q", documents)
        first = len(server.posts)
        scorer.score("q", documents)

    assert sorted(len(post.json["texts"]) for post in server.posts[:first]) == [4, 8, 8, 20]
    assert sorted(len(post.json["texts"]) for post in server.posts[first:]) == [4, 8, 8]


def test_sglang_cannot_score_an_empty_document_and_says_which():
    stub = wire.Sglang()
    with (
        serving(stub.handle) as server,
        HttpScorer(server.url, dialect="sglang") as scorer,
        pytest.raises(DocumentScoringError, match=r"documents\[1\].*empty document") as caught,
    ):
        scorer.score("q", ["one 1", "  ", "two 2"])

    assert list(caught.value.failed) == [1]
    np.testing.assert_allclose(caught.value.scores[[0, 2]], expected("q", ["one 1", "two 2"]), atol=1e-5)


def test_a_logit_where_a_probability_is_expected_is_no_score():
    """A BERT reranker on llama.cpp gives logits: nothing is guessed, and the way out is named."""
    stub = wire.LlamaCpp()
    reply = {"results": [{"index": 0, "relevance_score": 3.5}]}
    with serving(lambda request: reply if request.method == "POST" else stub.handle(request)) as server:
        with HttpScorer(server.url, dialect="llamacpp") as scorer, pytest.raises(ProtocolError, match="scores='logit'"):
            scorer.score("q", ["d"])
        with HttpScorer(server.url, dialect="llamacpp", scores="logit") as scorer:
            assert scorer.score("q", ["d"]) == pytest.approx([3.5])
