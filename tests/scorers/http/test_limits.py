"""A document that the server refuses fails alone, and what the server says of its limits is kept."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_rerank.errors import BackendRejectedError
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.http import HttpScorer, transport
from qwen_rerank.scorers.http.limits import Limit, chars_within, estimated_tokens, stated_limit
from tests.checkpoints import official_tokenizers
from tests.scorers.http import wire
from tests.scorers.http.calls import llamacpp, results
from tests.scorers.http.stub import Reply, serving

LONG = "word " * 3000 + "2"
DOCUMENTS = ["good 1", LONG, "better 3"]

REFUSALS = {
    "vllm": (400, "This model's maximum context length is 512 tokens. However, your request has 3012 input tokens."),
    "vllm, newer": (400, "The decoder prompt (length 3012) is longer than the maximum model length of 512."),
    "sglang": (400, "The input (3012 tokens) is longer than the model's context length (512 tokens)."),
    "tei": (413, "Input validation error: `inputs` must have less than 512 tokens. Given: 3012"),
    "llama.cpp": (
        500,
        "input (3012 tokens) is too large to process. increase the physical batch size (current batch size: 512)",
    ),
    "llama.cpp, newer": (500, "the request exceeds the available context size (512 tokens), try increasing it"),
    "a gateway": (422, "documents[1] is too long"),
    "a proxy": (413, "Request Entity Too Large"),
    "a filter": (400, "content policy"),
}


def refusing(stub, status, message, *, most_chars=2000):
    """The stub's server, which refuses a request with a long text or prompt in it."""

    def handle(request):
        if request.method == "POST":
            body = request.json
            texts = body.get("documents") or body.get("texts") or body.get("input") or body.get("input_ids") or []
            if any(len(text) > most_chars for text in texts):
                return Reply(status, {"error": {"message": message, "type": "invalid_request_error"}})
        return stub.handle(request)

    return handle


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("name", wire.SERVERS)
def test_a_document_that_is_refused_costs_the_others_nothing(name, refusal, monkeypatch):
    """It is cut where the server says how much it takes, and else the only one without a score."""
    monkeypatch.setattr(transport, "RETRIES", 0)
    stub = wire.SERVERS[name]()
    stub.max_model_len = None
    status, message = REFUSALS[refusal]
    with (
        serving(refusing(stub, status, message)) as server,
        HttpScorer(server.url, dialect=name, model=wire.MODEL, mode="server-template", max_length=512) as scorer,
    ):
        details = scorer.score_details("q", DOCUMENTS)

    assert stub.problem is None
    assert details.log_odds[2] > details.log_odds[0]
    if 1 in details.errors:
        assert list(details.errors) == [1]
        assert isinstance(details.errors[1], BackendRejectedError)
    else:
        assert 0 < details.kept_chars[1] <= 2000


def test_prompts_are_cut_to_a_limit_that_only_a_refusal_told():
    stub = wire.Vllm()
    stub.max_model_len = 10**6
    message = "This model's maximum context length is 512 tokens."
    with (
        serving(refusing(stub, 400, message, most_chars=512)) as server,
        HttpScorer(server.url, dialect="vllm", tokenizer="pocket") as scorer,
    ):
        first = scorer.score_details("q", DOCUMENTS)
        asked = len(server.posts)
        second = scorer.score_details("q", DOCUMENTS)

    assert not first.errors
    assert 500 < first.tokens[1] <= 512
    assert 0 < first.kept_chars[1] < len(LONG)
    assert list(second.log_odds) == list(first.log_odds)
    assert len(server.posts) == asked + 1
    assert scorer.max_length <= 512


def test_a_text_that_is_cut_by_an_estimate_is_marked_and_cut_at_once_the_next_time():
    handle = refusing(wire.LlamaCpp(), *REFUSALS["llama.cpp"])
    with serving(handle) as server, llamacpp(server.url) as scorer:
        hits = Reranker(scorer).rerank("q", DOCUMENTS)
        asked = len(server.posts)
        scorer.score("q", DOCUMENTS)

    assert [hit.truncated for hit in sorted(hits, key=lambda hit: hit.index)] == [False, True, False]
    assert len(server.posts) == asked + 1


def test_a_500_that_names_a_limit_is_not_tried_again():
    with (
        serving(refusing(wire.LlamaCpp(), 500, "input is too large to process", most_chars=1)) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendRejectedError, match="too large to process"),
    ):
        scorer.score("q", ["d d"])

    assert len(server.posts) == 1


BATCH_LIMITS = [
    "array should have size <= 25",
    "batch size 60 > maximum allowed batch size 25",
    "List should have at most 25 items after validation, not 60",
    "The maximum number of documents is 25",
    "You sent 60 documents; the limit is 25",
    "cannot rerank more than 25 documents",
]


@pytest.mark.parametrize("message", BATCH_LIMITS)
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_batch_limit_is_learnt_and_kept(status, message):
    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        n = len(request.json["documents"])
        return Reply(status, {"detail": message}) if n > 25 else results(*((i, 0.5) for i in range(n)))

    with serving(handle) as server, llamacpp(server.url) as scorer:
        scorer.score("q", [f"d{i}" for i in range(60)])
        scorer.score("q", [f"e{i}" for i in range(60)])

    assert [len(post.json["documents"]) for post in server.posts[:1]] == [60]
    assert sorted(len(post.json["documents"]) for post in server.posts[1:]) == [10, 10, 25, 25, 25, 25]


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_refusal_of_all_is_not_asked_again_for_each_document(status):
    handle = lambda request: Reply(404 if request.method == "GET" else status, {"message": "no"})  # noqa: E731
    with (
        serving(handle) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendRejectedError),
    ):
        scorer.score("q", [f"d{i}" for i in range(64)])

    assert len(server.posts) == 1


def test_a_wrong_request_is_told_from_wrong_documents_by_two_of_them():
    handle = lambda request: Reply(404 if request.method == "GET" else 400, {"message": "no such field"})  # noqa: E731
    with serving(handle) as server, llamacpp(server.url) as scorer, pytest.raises(BackendRejectedError):
        scorer.score("q", [f"d{i}" for i in range(64)])

    assert len(server.posts) == 3


@pytest.mark.parametrize("bad", [[0], [63], [31, 32], [5, 20, 40]])
def test_bad_documents_are_found_in_few_requests(bad):
    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        texts = request.json["documents"]
        wrong = any(f"d{place:02} bad" in texts for place in bad)
        return Reply(422, {"detail": "unprocessable"}) if wrong else results(*((i, 0.5) for i in range(len(texts))))

    texts = [f"d{i:02} bad" if i in bad else f"d{i:02} good" for i in range(64)]
    with serving(handle) as server, llamacpp(server.url) as scorer:
        details = scorer.score_details("q", texts)

    assert sorted(details.errors) == bad
    assert np.flatnonzero(np.isnan(details.log_odds)).tolist() == bad
    assert len(server.posts) <= 3 + 2 * 6 * len(bad)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        *((message, Limit("documents", 25)) for message in BATCH_LIMITS),
        *((message, Limit("tokens", 512)) for name, (_, message) in REFUSALS.items() if name[0] in "vstl"),
        ("documents[3] is too long", Limit("tokens")),
        ("too many documents", Limit("documents")),
        ("maximum context length is 512 tokens, your inputs have 3012 tokens", Limit("tokens", 512)),
        ("batch size 64 exceeds limit 32", Limit("documents", 32)),
        ("number of documents must be <= 100", Limit("documents", 100)),
        ("文档数量超过最大限制 64", Limit("documents", 64)),
        ("prompt is too long: 9000 tokens > 8192 maximum", Limit("tokens", 8192)),
        ("Input is too long: 70,000 tokens; the limit is 32,768 tokens", Limit("tokens", 32768)),
        ("输入长度超过模型最大长度 8192", Limit("tokens", 8192)),
        ("该文档的内容过长", Limit("tokens")),
        ("model `x` does not exist", None),
        ("field required", None),
        ("", None),
    ],
)
def test_what_a_refusal_says_of_limits_is_read(text, limit):
    assert stated_limit(text) == limit


@pytest.mark.parametrize("text", ["The capital of China is Beijing. " * 40, "北京是中国的首都。" * 40, "12 345 " * 40])
def test_the_estimate_of_tokens_is_rather_too_high(text, tokenizer_dir):
    encoder = PromptEncoder(official_tokenizers(tokenizer_dir)[0])
    with_text, without = encoder.encode("q", [text, ""])

    assert estimated_tokens(text, 10**6) >= 0.9 * (len(with_text.ids) - len(without.ids))
    assert estimated_tokens(text[: chars_within(text, 50)], 10**6) <= 50
