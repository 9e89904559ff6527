"""The keys of an evaluation's scores, which are of whole documents, however many windows were read of them."""

from __future__ import annotations

import hashlib
import json

from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.score_cache import KeptScore, ScoreCache

__all__ = ["KeptScore", "ScoreCache", "document_key"]


def document_key(reranker: Reranker, query: str, text: str) -> bytes:
    """Return the key of one document's score under `reranker`."""
    parts = [sorted(reranker.calibration_key().items()), query, text]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8")).digest()
