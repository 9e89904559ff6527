"""The old place of what reads files to documents."""

from qwen_rerank.deprecation import moved

__getattr__ = moved(__name__, "qwen_rerank.folders", read_documents="read_files")
