"""Any sentence-transformers cross-encoder with one label (BGE, GTE, MiniLM, …) as a `Scorer`, in torch or ONNX."""

from qwen_rerank.scorers.cross_encoder.scorer import CrossEncoderScorer

__all__ = ["CrossEncoderScorer"]
