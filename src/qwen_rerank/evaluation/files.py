"""An old place of `qwen_rerank.documents`."""

from qwen_rerank.deprecation import moved

__getattr__ = moved(__name__, "qwen_rerank.documents", EvalFileError="FileError")
