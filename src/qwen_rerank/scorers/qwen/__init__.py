"""The local engine: Qwen3-Reranker in this process."""

from qwen_rerank.errors import MissingExtraError

try:
    import torch  # noqa: F401 - everything in here computes with it
except ImportError as exc:
    raise MissingExtraError(
        "QwenScorer",
        package="torch",
        extra="local",
        cause=exc,
        instead="the small model that ships with the package, 'mini' (--model mini)",
    ) from (None if exc.name == "torch" else exc)  # of a broken torch one wants to see more

from qwen_rerank.scorers.qwen.engine import QwenConfig
from qwen_rerank.scorers.qwen.scorer import QwenScorer

__all__ = ["QwenConfig", "QwenScorer"]
