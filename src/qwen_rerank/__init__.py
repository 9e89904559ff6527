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
    "CachedScorer": "qwen_rerank.scorers.cached",
    "Calibration": "qwen_rerank.calibration",
    "Candidate": "qwen_rerank.types",
    "Cascade": "qwen_rerank.pipeline",
    "CrossEncoderScorer": "qwen_rerank.scorers.cross_encoder",
    "DetailedScorer": "qwen_rerank.protocols",
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
    "ScorerPool": "qwen_rerank.scorers.pool",
    "Scores": "qwen_rerank.types",
    "TwoStageRetriever": "qwen_rerank.pipeline",
    "load_embedder": "qwen_rerank.embedders",
    "load_scorer": "qwen_rerank.scorers.loading",
    "sync_folder": "qwen_rerank.folders",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:  # `X as X` says to type checkers that X is public; they cannot read the `__all__` above
    from qwen_rerank.calibration import Calibration as Calibration
    from qwen_rerank.embedders import load_embedder as load_embedder
    from qwen_rerank.errors import RerankError as RerankError
    from qwen_rerank.folders import sync_folder as sync_folder
    from qwen_rerank.lexical import BM25Index as BM25Index
    from qwen_rerank.pipeline import Cascade as Cascade
    from qwen_rerank.pipeline import TwoStageRetriever as TwoStageRetriever
    from qwen_rerank.protocols import DetailedScorer as DetailedScorer
    from qwen_rerank.protocols import Embedder as Embedder
    from qwen_rerank.protocols import FirstStage as FirstStage
    from qwen_rerank.protocols import Scorer as Scorer
    from qwen_rerank.reranker import Reranker as Reranker
    from qwen_rerank.scorers.cached import CachedScorer as CachedScorer
    from qwen_rerank.scorers.cross_encoder import CrossEncoderScorer as CrossEncoderScorer
    from qwen_rerank.scorers.http import HttpScorer as HttpScorer
    from qwen_rerank.scorers.loading import load_scorer as load_scorer
    from qwen_rerank.scorers.pool import ScorerPool as ScorerPool
    from qwen_rerank.scorers.qwen import QwenScorer as QwenScorer
    from qwen_rerank.store import FaissStore as FaissStore
    from qwen_rerank.types import Candidate as Candidate
    from qwen_rerank.types import Document as Document
    from qwen_rerank.types import Fit as Fit
    from qwen_rerank.types import RankedDocument as RankedDocument
    from qwen_rerank.types import Scores as Scores


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
