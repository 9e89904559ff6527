"""The document store: documents, metadata and vectors in SQLite, searched through a FAISS index over them."""

from qwen_rerank.store.commits import DeleteReport
from qwen_rerank.store.errors import (
    CorruptStoreError,
    DimensionMismatchError,
    DuplicateIdError,
    EmbedderMismatchError,
    FaissWheelsError,
    ForkedHandleError,
    FormatTooNewError,
    InvalidEmbeddingError,
    NotAStoreError,
    StoreClosedError,
    StoreExistsError,
    StoreFullError,
    StoreIOError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
)
from qwen_rerank.store.faiss_build import faiss_wheels
from qwen_rerank.store.faiss_store import FaissStore
from qwen_rerank.store.opening import StoreStatistics, VerifyReport, built_with, verify_store
from qwen_rerank.store.sharded import ShardedFirstStage
from qwen_rerank.store.transfer import ImportedDocuments, export_store, read_export
from qwen_rerank.store.tuning import TunedEffort

__all__ = [
    "CorruptStoreError",
    "DeleteReport",
    "DimensionMismatchError",
    "DuplicateIdError",
    "EmbedderMismatchError",
    "FaissStore",
    "FaissWheelsError",
    "ForkedHandleError",
    "FormatTooNewError",
    "ImportedDocuments",
    "InvalidEmbeddingError",
    "NotAStoreError",
    "ShardedFirstStage",
    "StoreClosedError",
    "StoreExistsError",
    "StoreFullError",
    "StoreIOError",
    "StoreLockedError",
    "StoreNotFoundError",
    "StoreReadOnlyError",
    "StoreStatistics",
    "TunedEffort",
    "VerifyReport",
    "built_with",
    "export_store",
    "faiss_wheels",
    "read_export",
    "verify_store",
]
