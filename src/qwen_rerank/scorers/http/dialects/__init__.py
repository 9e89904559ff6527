"""The dialects of rerank servers by name, and how a server's dialect is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from qwen_rerank.scorers.http.dialects.dialect import Dialect
from qwen_rerank.scorers.http.dialects.servers import (
    Cohere,
    Infinity,
    Jina,
    LlamaCpp,
    QwenRerank,
    Sglang,
    Tei,
    Vllm,
    Voyage,
    Xinference,
)

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Vllm(), Sglang(), Tei(), LlamaCpp(), Infinity(), Xinference(), Cohere(), Jina(), Voyage(), QwenRerank(),
    )
}  # fmt: skip

HOSTED = frozenset({"cohere", "jina", "voyage"})
_HOSTS = {"cohere.com": "cohere", "cohere.ai": "cohere", "jina.ai": "jina", "voyageai.com": "voyage"}
# What each server writes as `owned_by` into its list of models.
_OWNERS = {
    "vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "infinity": "infinity", "xinference": "xinference",
    "qwen-rerank": "qwen-rerank",
}  # fmt: skip


def of_host(url: str) -> str | None:
    """Return the dialect of a hosted service by its host name, or None."""
    host = urlsplit(url).hostname or ""
    return next((name for domain, name in _HOSTS.items() if host == domain or host.endswith("." + domain)), None)


def of_models(payload: Any) -> str | None:
    """Return the dialect of a server by its answer to `GET /v1/models`, or None."""
    cards = payload.get("data") if isinstance(payload, Mapping) else None
    card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], Mapping) else {}
    owner = card.get("owned_by")
    return _OWNERS.get(owner.lower()) if isinstance(owner, str) else None


def of_info(payload: Any) -> str | None:
    """Return "tei" for an answer to `GET /info` that looks like TEI's, or None."""
    is_tei = isinstance(payload, Mapping) and "model_id" in payload and "max_client_batch_size" in payload
    return "tei" if is_tei else None
