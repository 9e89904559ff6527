"""Two-stage retrieval around Qwen3-Reranker.

Importing this package loads none of torch, faiss, transformers, langchain or llama_index: public names are resolved on
first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BM25Index": "qwen_rerank.lexical",
    "Calibration": "qwen_rerank.calibration",
    "Candidate": "qwen_rerank.types",
    "Cascade": "qwen_rerank.pipeline",
    "CrossEncoderScorer": "qwen_rerank.scorers.cross_encoder",
    "Document": "qwen_rerank.types",
    "Embedder": "qwen_rerank.protocols",
    "FaissStore": "qwen_rerank.store",
    "FirstStage": "qwen_rerank.protocols",
    "Fit": "qwen_rerank.types",
    "HttpScorer": "qwen_rerank.scorers.http",
    "QwenScorer": "qwen_rerank.scorers.qwen",
    "RankedDocument": "qwen_rerank.types",
    "RerankError": "qwen_rerank.errors",
    "Reranker": "qwen_rerank.reranker",
    "Scorer": "qwen_rerank.protocols",
    "TwoStageRetriever": "qwen_rerank.pipeline",
    "load_embedder": "qwen_rerank.embedders",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from qwen_rerank.calibration import Calibration
    from qwen_rerank.embedders import load_embedder
    from qwen_rerank.errors import RerankError
    from qwen_rerank.lexical import BM25Index
    from qwen_rerank.pipeline import Cascade, TwoStageRetriever
    from qwen_rerank.protocols import Embedder, FirstStage, Scorer
    from qwen_rerank.reranker import Reranker
    from qwen_rerank.scorers.cross_encoder import CrossEncoderScorer
    from qwen_rerank.scorers.http import HttpScorer
    from qwen_rerank.scorers.qwen import QwenScorer
    from qwen_rerank.store import FaissStore
    from qwen_rerank.types import Candidate, Document, Fit, RankedDocument


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
