"""Fine-tuning of rerankers and embedders on sentence-transformers' trainers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwen_rerank.documents import Example, TrainingData, load_training_data
from qwen_rerank.documents import Skipped as BadLine

_HOMES = {
    "EmbeddedDocuments": "mining",
    "EmbedderTraining": "embedder_training",
    "Mining": "mining",
    "RerankerTraining": "reranker_training",
    "TrainingReport": "reranker_training",
    "mine_negatives": "mining",
    "train_embedder": "embedder_training",
    "train_reranker": "reranker_training",
}

__all__ = [
    "BadLine",
    "EmbeddedDocuments",
    "EmbedderTraining",
    "Example",
    "Mining",
    "RerankerTraining",
    "TrainingData",
    "TrainingReport",
    "load_training_data",
    "mine_negatives",
    "train_embedder",
    "train_reranker",
]

if TYPE_CHECKING:
    from qwen_rerank.training.embedder_training import EmbedderTraining, train_embedder
    from qwen_rerank.training.mining import EmbeddedDocuments, Mining, mine_negatives
    from qwen_rerank.training.reranker_training import RerankerTraining, TrainingReport, train_reranker


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
