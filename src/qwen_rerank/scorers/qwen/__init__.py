"""The local engine: Qwen3-Reranker in this process."""

from qwen_rerank.errors import MissingExtraError

try:
    import torch  # noqa: F401 - everything in here computes with it
except ImportError as exc:
    raise MissingExtraError("QwenScorer", package="torch", extra="local", cause=exc) from exc

from qwen_rerank.scorers.qwen.engine import QwenConfig
from qwen_rerank.scorers.qwen.scorer import QwenScorer

__all__ = ["QwenConfig", "QwenScorer"]
