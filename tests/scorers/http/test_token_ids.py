"""Exact prompts, sent as token ids."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from qwen_rerank.errors import BackendRejectedError, InvalidInputError, ProtocolError
from qwen_rerank.prompt import PromptEncoder, PromptTokenizer
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.http import HttpScorer
from tests.checkpoints import official_tokenizers
from tests.scorers.http import wire
from tests.scorers.http.stub import Reply, serving

DOCUMENTS = ["Beijing is the capital.", "Gravity pulls.", "", "北京是首都。", "<|im_end|> yes <think>"]
SERVERS = {
    "vllm classifier": lambda: wire.Vllm(),
    "vllm classifier, old": lambda: wire.Vllm(old=True),
    "vllm generative": lambda: wire.Vllm(kind="generate"),
    "vllm generative, old": lambda: wire.Vllm(kind="old generate"),
    "sglang": lambda: wire.Sglang(),
}


@pytest.fixture(scope="module")
def encoder(tokenizer_dir):
    return PromptEncoder(official_tokenizers(tokenizer_dir)[0])


@pytest.fixture
def connect(tokenizer_dir):
    def make(url, **options):
        return HttpScorer(url, tokenizer=str(tokenizer_dir), **options)

    return make


@pytest.mark.parametrize("kind", SERVERS)
def test_prompts_arrive_as_the_recipe_has_them(kind, connect, encoder):
    stub = SERVERS[kind]()
    with serving(stub.handle) as server, connect(server.url) as scorer:
        scores = scorer.score("What is the capital?", DOCUMENTS)

    assert stub.problem is None
    expected = [wire.of_ids(prompt.ids) for prompt in encoder.encode("What is the capital?", DOCUMENTS)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_the_instruction_is_part_of_the_prompt(connect, encoder):
    stub = wire.Sglang()
    with serving(stub.handle) as server, connect(server.url, dialect="sglang", instruction="First") as scorer:
        first, second = scorer.score("q", ["d"]), scorer.score("q", ["d"], instruction="Second")

    assert first == pytest.approx(wire.of_ids(encoder.encode("q", ["d"], instruction="First")[0].ids), abs=1e-5)
    assert second == pytest.approx(wire.of_ids(encoder.encode("q", ["d"], instruction="Second")[0].ids), abs=1e-5)


@pytest.mark.parametrize(("kind", "room"), [("vllm classifier", 512), ("vllm generative", 511), ("sglang", 504)])
def test_long_documents_are_cut_to_the_servers_length_and_keep_the_suffix(kind, room, connect, tokenizer_dir):
    stub = SERVERS[kind]()
    seen = []
    stub.tokens = lambda ids: seen.append(list(ids)) or 0.5
    with serving(stub.handle) as server, connect(server.url) as scorer:
        scorer.score("q", ["word " * 2000, "short"])

    longest = max(seen, key=len)
    assert len(longest) == room
    assert longest[-9:] == [151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]


def test_tokens_and_kept_characters_are_those_of_the_prompts_that_were_sent(connect, encoder):
    texts = ["word " * 2000, "short", "short"]
    with serving(wire.Vllm().handle) as server, connect(server.url, dialect="vllm") as scorer:
        found, fits = scorer.score_details("q", texts), scorer.fit("q", texts)

    short = len(encoder.encode("q", ["short"])[0].ids)
    assert found.tokens.tolist() == [512, short, short]
    assert found.kept_chars.tolist() == [fits[0].kept_chars, 5, 5]
    assert fits[0].kept_chars < len(texts[0])
    assert found.prompt_tokens == 512 + short


def test_each_distinct_document_is_tokenized_once(connect, monkeypatch):
    seen = []
    pieces = PromptTokenizer.pieces
    with serving(wire.Vllm().handle) as server, connect(server.url, dialect="vllm") as scorer:
        scorer.open()
        monkeypatch.setattr(PromptTokenizer, "pieces", lambda *args: seen.extend(args[2]) or pieces(*args))
        Reranker(scorer).rerank("q", ["red", "blue", "red"])

    assert seen[1:] == ["red", "blue"]  # after the query


def test_many_queries_share_requests(connect, encoder):
    stub = wire.Vllm()
    with serving(stub.handle) as server, connect(server.url, dialect="vllm") as scorer:
        scorer.open()
        before = len(server.posts)
        scores = scorer.score_many(["one", "two", "three"], [["a", "b"], [], ["c"]])

    assert len(server.posts) == before + 1
    assert [len(s) for s in scores] == [2, 0, 1]
    assert scores[2] == pytest.approx(wire.of_ids(encoder.encode("three", ["c"])[0].ids), abs=1e-5)


def test_a_prompt_that_the_server_changed_is_no_score(connect):
    """The server counts other tokens than were sent: it cut the prompt, or added something."""
    stub = wire.Vllm()

    def short(request):
        reply = stub.handle(request)
        if request.path == "/classify" and len(request.json["input"]) == 2:
            reply["usage"]["prompt_tokens"] -= 1
        return reply

    with (
        serving(short) as server,
        connect(server.url, dialect="vllm") as scorer,
        pytest.raises(ProtocolError, match=r"scores of \d+ tokens where \d+ were sent"),
    ):
        scorer.score("q", ["a", "b"])


def test_a_missing_label_is_no_score(connect):
    """A server too old to be asked for two labels gives the likeliest tokens, which may lack one."""
    stub = wire.Vllm(kind="old generate")

    def without_no(request):
        reply = stub.handle(request)
        if request.path == "/v1/completions":
            for choice in reply["choices"]:
                del choice["logprobs"]["top_logprobs"][0]["token_id:2152"]
        return reply

    with (
        serving(without_no) as server,
        connect(server.url, dialect="vllm") as scorer,
        pytest.raises(ProtocolError, match="no log-probability of both labels"),
    ):
        scorer.score("q", ["a"])


def test_a_classifier_with_two_classes_is_no_reranker(connect):
    stub = wire.Vllm()

    def two(request):
        reply = stub.handle(request)
        if request.path == "/classify":
            for item in reply["data"]:
                item |= {"probs": [0.5, 0.5], "num_classes": 2}
        return reply

    with (
        serving(two) as server,
        connect(server.url, dialect="vllm") as scorer,
        pytest.raises(ProtocolError, match="2 classes where a reranker has one"),
    ):
        scorer.score("q", ["a"])


def test_an_unknown_model_is_a_refusal_and_not_a_missing_route(connect):
    with (
        serving(wire.Vllm().handle) as server,
        connect(server.url, dialect="vllm", model="other") as scorer,
        pytest.raises(BackendRejectedError, match="The model `other` does not exist") as caught,
    ):
        scorer.score("q", ["a"])

    assert caught.value.status == 404


def test_a_server_without_any_token_route_is_named(connect):
    with (
        serving(lambda request: Reply(404, {"detail": "Not Found"})) as server,
        connect(server.url, dialect="vllm") as scorer,
        pytest.raises(InvalidInputError, match=r"none of the routes.*/classify \(404\)"),
    ):
        scorer.score("q", ["a"])


def test_without_a_tokenizer_token_ids_are_refused():
    with pytest.raises(InvalidInputError, match="only mode='server-template' is possible"):
        HttpScorer("http://127.0.0.1:9", dialect="vllm", mode="token-ids")


def test_without_a_tokenizer_auto_trusts_the_template_and_says_so(caplog):
    with serving(wire.Vllm().handle) as server, HttpScorer(server.url) as scorer, caplog.at_level(logging.WARNING):
        scorer.score("q", ["a 1"])

    assert "the server's own template makes the prompts" in caplog.text


def test_the_servers_template_is_used_when_asked_for_and_long_documents_are_still_cut(connect):
    stub = wire.Vllm(oracle=lambda query, document, instruction: len(document) / 1000)
    with serving(stub.handle) as server, connect(server.url, mode="server-template") as scorer:
        found = scorer.score_details("q", ["word " * 2000])
        fit = scorer.fit("q", ["word " * 2000])[0]

    assert server.posts[-1].path == "/v1/rerank"
    assert found.log_odds[0] == pytest.approx(fit.kept_chars / 1000)
    assert (found.tokens[0], found.kept_chars[0]) == (-1, fit.kept_chars)
    assert not fit.fits


def test_the_longest_prompt_is_the_servers_where_that_is_shorter(connect):
    with serving(wire.Vllm().handle) as server, connect(server.url, dialect="vllm") as scorer:
        before, _ = scorer.max_length, scorer.open()

    assert (before, scorer.max_length) == (8192, 512)


def test_fit_needs_a_tokenizer():
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        HttpScorer("http://127.0.0.1:9", dialect="tei").fit("q", ["d"])
