"""Answers in the shape that each family of clients reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qwen_rerank.serve.schemas import RankingRequest, RerankRequest, TeiRequest
from qwen_rerank.serve.scoring import RerankResult
from qwen_rerank.types import RankedDocument


def rerank(request: RerankRequest, outcome: RerankResult, *, request_id: str, model: str) -> dict[str, Any]:
    """Return Jina's, Cohere's and vLLM's answer in one; with `data` too where the request speaks Voyage's language."""
    hits = outcome.ranked[: request.limit]
    answer = {
        "id": request_id,
        # Infinity's client takes no other word, and asks on the same path as all the others.
        "object": "rerank",
        "model": model,
        "results": [_result(hit, request, as_object=True) for hit in hits],
        "usage": usage(outcome.tokens),
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": outcome.tokens, "output_tokens": 0},
        },
    }
    if request.top_k is not None:
        answer["data"] = [_result(hit, request, as_object=False) for hit in hits]
    return answer


def infinity(request: RerankRequest, outcome: RerankResult, *, request_id: str, model: str) -> dict[str, Any]:
    """Return Infinity's answer: documents are plain strings."""
    return {
        "object": "rerank",
        "id": request_id,
        "model": model,
        "created": int(time.time()),
        "results": [_result(hit, request, as_object=False) for hit in outcome.ranked[: request.limit]],
        "usage": usage(outcome.tokens),
    }


def voyage(request: RerankRequest, outcome: RerankResult, *, request_id: str, model: str) -> dict[str, Any]:
    """Return Voyage's answer: the list is under `data`, documents are plain strings."""
    return {
        "id": request_id,
        "object": "list",
        "model": model,
        "data": [_result(hit, request, as_object=False) for hit in outcome.ranked[: request.limit]],
        "usage": usage(outcome.tokens),
    }


def tei(request: TeiRequest, outcome: RerankResult) -> list[dict[str, Any]]:
    """Return Text Embeddings Inference's answer: a bare list."""
    return [
        {"index": hit.index, "score": _score(hit, log_odds=request.wants_log_odds)}
        | ({"text": hit.document.text} if request.return_text else {})
        for hit in outcome.ranked[: request.top_n]
    ]


def ranking(request: RankingRequest, outcome: RerankResult) -> dict[str, Any]:
    """Return NIM's answer, whose scores are log-odds."""
    return {
        "rankings": [{"index": hit.index, "logit": hit.log_odds} for hit in outcome.ranked],
        "usage": usage(outcome.tokens),
    }


def scores(outcomes: Sequence[RerankResult], *, log_odds: bool, request_id: str, model: str) -> dict[str, Any]:
    """Return vLLM's answer to `/score`: all pairs in input order."""
    tokens = sum(outcome.tokens for outcome in outcomes)
    hits = [hit for outcome in outcomes for hit in sorted(outcome.ranked, key=lambda hit: hit.index)]
    return {
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [
            {"index": index, "object": "score", "score": _score(hit, log_odds=log_odds)}
            for index, hit in enumerate(hits)
        ],
        "usage": usage(tokens),
    }


def models(names: Sequence[str], *, max_length: int | None, started_at: int) -> dict[str, Any]:
    """Return OpenAI's list of models."""
    data = [model(name, max_length=max_length, started_at=started_at) for name in names]
    return {"object": "list", "data": data}


def model(name: str, *, max_length: int | None, started_at: int) -> dict[str, Any]:
    """Return one model as OpenAI does, with its type as Xinference does."""
    return {
        "id": name,
        "object": "model",
        "created": started_at,
        "owned_by": "qwen-rerank",
        "max_model_len": max_length,
        "model_type": "rerank",
    }


def usage(tokens: int) -> dict[str, int]:
    """Return the token counts as OpenAI does."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _result(hit: RankedDocument, request: RerankRequest, *, as_object: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "index": hit.index,
        "relevance_score": _score(hit, log_odds=request.wants_log_odds),
    }
    if request.return_documents:
        result["document"] = {"text": hit.document.text} if as_object else hit.document.text
    if request.return_details:
        result["log_odds"] = hit.log_odds
        result["truncated"] = hit.truncated
        result["windows"] = hit.windows
        result["best_window"] = list(hit.best_window) if hit.best_window else None
    return result


def _score(hit: RankedDocument, *, log_odds: bool) -> float:
    return hit.log_odds if log_odds else hit.score
