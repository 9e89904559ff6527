"""Commits: what a store is after each, and the change that leads from one to the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_rerank.store.record import CommitRecord
from qwen_rerank.store.rows import Row, encode_row
from qwen_rerank.types import Document

MODULUS = 1 << 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is fixed when a store is created.

    Attributes:
        store: Identity of the store, 32 hex digits.
        embedder: Name of the embedder, as `load_embedder` takes it, or "" where it has none.
        fingerprint: Its fingerprint, which decides whether an embedder is the same.
        dim: Length of a vector.
        metric: "cosine" or "ip".
        index: FAISS factory string.
    """

    store: str
    embedder: str
    fingerprint: str
    dim: int
    metric: str
    index: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A state of the whole store.

    Attributes:
        number: From 0 for the empty store.
        next_row: The row number that comes next; none is given twice.
        previous: Chain of the commit before.
        content: Sum of the digests of all rows modulo 2**128: it does not depend on the order, so a commit updates it
            from the rows that come and go.
        documents: How many rows there are.
        without_vector: How many of them have no vector.
    """

    number: int
    next_row: int
    previous: str
    content: int
    documents: int
    without_vector: int

    def chain(self, settings: Settings) -> str:
        """Return the running hash over settings, content and every commit before, 64 hex digits."""
        fields = [
            self.previous,
            self.number,
            self.next_row,
            f"{self.content:032x}",
            self.documents,
            self.without_vector,
        ]
        named = {name: getattr(settings, name) for name in Settings.__slots__}
        return hashlib.sha256(json.dumps([named, fields], sort_keys=True).encode()).hexdigest()

    def record(self, settings: Settings) -> CommitRecord:
        """Return what the commit record must say of it."""
        return CommitRecord(store=settings.store, commit=self.number, chain=self.chain(settings))


@dataclass(frozen=True, slots=True)
class Change:
    """Rows that come and go in one commit; `vectors` are those of the added rows that have one."""

    added: Sequence[Row]
    vectors: Sequence[tuple[int, bytes]]
    removed: Sequence[Row]

    @classmethod
    def replacing(
        cls, documents: Sequence[Document], vectors: np.ndarray, removed: Sequence[Row], *, first: int
    ) -> Change:
        """Return the change that stores `documents` under row numbers from `first` on, in place of rows `removed`.

        Args:
            documents: What is stored.
            vectors: Their vectors, float32 `(n_documents, dim)`; a row of zeros is none.
            removed: Rows that go.
            first: Row number of the first document.
        """
        blobs = [vector.astype("<f4").tobytes() if vector.any() else None for vector in vectors]
        added = [
            encode_row(first + place, document, blob, place=place)
            for place, (document, blob) in enumerate(zip(documents, blobs, strict=True))
        ]
        stored = [(row.number, blob) for row, blob in zip(added, blobs, strict=True) if blob is not None]
        return cls(added=added, vectors=stored, removed=removed)

    def apply(self, commit: Commit, settings: Settings) -> Commit:
        """Return the state after this change of `commit`."""
        content = commit.content
        content += sum(int.from_bytes(row.digest()) for row in self.added)
        content -= sum(int.from_bytes(row.digest()) for row in self.removed)
        without = sum(row.vector_digest is None for row in self.added)
        without -= sum(row.vector_digest is None for row in self.removed)
        return Commit(
            number=commit.number + 1,
            next_row=commit.next_row + len(self.added),
            previous=commit.chain(settings),
            content=content % MODULUS,
            documents=commit.documents + len(self.added) - len(self.removed),
            without_vector=commit.without_vector + without,
        )


@dataclass(frozen=True, slots=True)
class DeleteReport:
    """What `delete` did.

    Attributes:
        deleted: How many documents were removed.
        not_found: The ids that were not there.
    """

    deleted: int
    not_found: tuple[str, ...]
