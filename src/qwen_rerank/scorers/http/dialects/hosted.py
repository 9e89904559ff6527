"""Hosted services. Their scores order documents but are no probability of relevance."""

from __future__ import annotations

from typing import Any

from qwen_rerank.scorers.http.dialects.base import Ask, Dialect


class Cohere(Dialect):
    """Cohere's v2 API; the first 4,096 tokens of a document are read."""

    name = "cohere"
    path = "/v2/rerank"
    max_batch = 1000
    needs_model = True
    kind = "relevance"

    def _fields(self, ask: Ask) -> dict[str, Any]:
        return {"top_n": len(ask.documents)}


class Jina(Dialect):
    """Jina's API; the range of its scores depends on the model."""

    name = "jina"
    max_batch = 1000
    needs_model = True
    kind = "raw"

    def _fields(self, ask: Ask) -> dict[str, Any]:
        return {"top_n": len(ask.documents), "return_documents": False}


class Voyage(Dialect):
    """Voyage's API, also MongoDB Atlas; the list is under `data`."""

    name = "voyage"
    max_batch = 1000
    needs_model = True
    kind = "relevance"

    def _fields(self, ask: Ask) -> dict[str, Any]:
        return {"top_k": len(ask.documents), "return_documents": False, "truncation": True}
