"""The one door to files of documents, queries, judgements, runs and training rows."""

from __future__ import annotations

from qwen_rerank.deprecation import moved
from qwen_rerank.documents.judgements import Qrels, Run, read_qrels, read_run, write_run, write_whole
from qwen_rerank.documents.queries import read_queries
from qwen_rerank.documents.reader import Skipped
from qwen_rerank.documents.texts import Reading, read_corpus
from qwen_rerank.documents.training import Example, TrainingData, load_training_data
from qwen_rerank.errors import FileError

__all__ = [
    "Example",
    "FileError",
    "Qrels",
    "Reading",
    "Run",
    "Skipped",
    "TrainingData",
    "load_training_data",
    "read_corpus",
    "read_qrels",
    "read_queries",
    "read_run",
    "write_run",
    "write_whole",
]

__getattr__ = moved(__name__, "qwen_rerank.folders", read_documents="read_files")
