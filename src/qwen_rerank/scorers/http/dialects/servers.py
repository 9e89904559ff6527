"""The dialects: servers that people run themselves, and hosted services.

The scores of hosted services order documents but are no probability of relevance.
"""

from __future__ import annotations

import json
from typing import Any

from qwen_rerank.scorers.http.answers import HttpAnswer, ParsedAnswer, raise_protocol_error, read_results
from qwen_rerank.scorers.http.dialects.dialect import Dialect, ServerRequest, optional
from qwen_rerank.scorers.http.dialects.token_routes import (
    SglangGenerate,
    VllmClassify,
    VllmCompletions,
    VllmGenerativeScoring,
)

_COUNT_DIGITS = 18  # of tokens, in a header


class Vllm(Dialect):
    """vLLM. It answers with probabilities unless told not to; old releases ignore that."""

    name = "vllm"
    carries_instruction = True
    can_give_logits = True
    may_ignore_logits = True
    token_routes = (VllmClassify(), VllmGenerativeScoring(), VllmCompletions())

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {**optional("instruction", request.instruction), **({"use_activation": False} if request.logits else {})}


class Sglang(Dialect):
    """SGLang: the instruction is `instruct`, the answer a bare list, and one empty document fails the request."""

    name = "sglang"
    carries_instruction = True
    scores_blank = False
    token_routes = (SglangGenerate(),)

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {"return_documents": False, **optional("instruct", request.instruction)}


class Tei(Dialect):
    """Hugging Face text-embeddings-inference. It takes 32 documents by default, and cannot load Qwen3-Reranker."""

    name = "tei"
    path = "/rerank"
    max_batch = 32
    can_give_logits = True

    def body(self, request: ServerRequest) -> dict[str, Any]:
        """Return the JSON to send: `texts`, no model; a long document is cut by the server."""
        texts = list(request.documents)
        return {
            "query": request.query,
            "texts": texts,
            "raw_scores": request.logits,
            "truncate": True,
            "return_text": False,
        }

    def read(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> ParsedAnswer:
        """Return the scores; the tokens are counted in a header."""
        reading = read_results(answer, payload, len(request), score_keys=("score",))
        counted = answer.headers.get("x-compute-tokens", "")
        if len(counted) > _COUNT_DIGITS:
            raise_protocol_error(answer, f"a count of tokens with {len(counted)} digits")
        return ParsedAnswer(reading.scores, int(counted) if counted.isdecimal() else None, None, reading.echoes)


class LlamaCpp(Dialect):
    """llama.cpp's server: P(yes) for a Qwen3 GGUF with its rerank head, a logit for BERT-like rerankers."""

    name = "llamacpp"


class Infinity(Dialect):
    """michaelfeil/infinity."""

    name = "infinity"
    path = "/rerank"
    max_batch = 2048
    can_give_logits = True

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {"raw_scores": request.logits, "return_documents": False}


class Xinference(Dialect):
    """Xorbits Inference: further arguments travel as a JSON string, and only its transformers engine reads them."""

    name = "xinference"
    needs_model = True
    carries_instruction = True

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        extra = None if request.instruction is None else json.dumps({"instruction": request.instruction})
        return {"return_documents": False, "return_len": True, **optional("kwargs", extra)}


class QwenRerank(Dialect):
    """Our own server; its `raw_scores` are log-odds."""

    name = "qwen-rerank"
    carries_instruction = True
    can_give_logits = True

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {"return_documents": False, "raw_scores": request.logits, **optional("instruction", request.instruction)}


class Cohere(Dialect):
    """Cohere's v2 API; the first 4,096 tokens of a document are read."""

    name = "cohere"
    path = "/v2/rerank"
    max_batch = 1000
    needs_model = True
    kind = "relevance"

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {"top_n": len(request.documents)}


class Jina(Dialect):
    """Jina's API; the range of its scores depends on the model."""

    name = "jina"
    max_batch = 1000
    needs_model = True
    kind = "raw"

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {"top_n": len(request.documents), "return_documents": False}


class Voyage(Dialect):
    """Voyage's API, also MongoDB Atlas; the list is under `data`."""

    name = "voyage"
    max_batch = 1000
    needs_model = True
    kind = "relevance"

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {"top_k": len(request.documents), "return_documents": False, "truncation": True}
