"""The local engine: Qwen3-Reranker in this process."""

from qwen_rerank.scorers.qwen.scorer import QwenScorer
from qwen_rerank.scorers.qwen.settings import QwenConfig

__all__ = ["QwenConfig", "QwenScorer"]
