"""A store of documents that can be searched by meaning: SQLite holds the truth, FAISS is an index over it."""

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
from qwen_rerank.store.faiss_store import FaissStore
from qwen_rerank.store.opening import built_with
from qwen_rerank.store.verify import VerifyReport, verify_store
from qwen_rerank.store.wheels import faiss_wheels

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
    "InvalidEmbeddingError",
    "NotAStoreError",
    "StoreClosedError",
    "StoreExistsError",
    "StoreFullError",
    "StoreIOError",
    "StoreLockedError",
    "StoreNotFoundError",
    "StoreReadOnlyError",
    "VerifyReport",
    "built_with",
    "faiss_wheels",
    "verify_store",
]
