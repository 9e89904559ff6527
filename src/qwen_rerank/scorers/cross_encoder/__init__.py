"""Any sentence-transformers cross-encoder with one label (BGE, GTE, MiniLM, …) as a `Scorer`."""

from qwen_rerank.errors import MissingExtraError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as exc:
    raise MissingExtraError("CrossEncoderScorer", package="transformers", extra="transformers", cause=exc) from exc

from qwen_rerank.scorers.cross_encoder.scorer import CrossEncoderScorer

__all__ = ["CrossEncoderScorer"]
