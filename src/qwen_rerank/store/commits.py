"""Commits: the state of a store after each, the change that leads to the next, and the record of the last one.

SQLite cannot tell that its last commits are gone: a database put back to an older state is a valid database. So every
commit is acknowledged only after a small file beside the database, the commit record, names it, and `open` compares the
two. A crash can leave the record one commit behind the database (committed, not yet acknowledged), and never ahead of
it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rerank.store.errors import CorruptStoreError, FormatTooNewError
from qwen_rerank.store.files import explained, publish, read_start, write_temporary
from qwen_rerank.store.rows import Row, encode_row
from qwen_rerank.types import Document

FORMAT = 2  # 2: words, declared fields, and more kinds of vectors and indexes
RECORD_FILE = "commit.json"
_RECORD_BYTES = 100_000  # far more than one has
MODULUS = 1 << 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """The settings of a whole store; they change in commits only, as documents do.

    Attributes:
        store: Identity of the store, 32 hex digits.
        embedder: Name of the embedder, as `load_embedder` takes it, or "" where it has none.
        fingerprint: Its fingerprint, which decides whether an embedder is the same.
        dim: Length of a vector.
        metric: "cosine" or "ip".
        index: FAISS factory string.
        words: Whether there is an index of words.
        indexed_fields: Metadata fields that have an index for filters.
        vectors: "float32" or "float16", how vectors are stored.
        effort: How much an approximate search looks into; 0 is what suits most.
    """

    store: str
    embedder: str
    fingerprint: str
    dim: int
    metric: str
    index: str
    words: bool = False
    indexed_fields: tuple[str, ...] = ()
    vectors: str = "float32"
    effort: int = 0

    def encoded(self) -> dict[str, Any]:
        """Return what JSON keeps of it, in format 1 without what that did not know."""
        named = asdict(self)
        return named if self.format > 1 else {name: named[name] for name in _FORMAT_1}

    @property
    def format(self) -> int:
        """Number of the store format that it needs."""
        known = re.fullmatch(r"Flat|HNSW\d+", self.index) and self.vectors == "float32" and not self.effort
        return 1 if known and not self.words and not self.indexed_fields else 2

    @property
    def vector_kind(self) -> str:
        """Numpy's name of the numbers of a stored vector."""
        return "<f2" if self.vectors == "float16" else "<f4"

    @classmethod
    def decoded(cls, fields: dict[str, Any]) -> StoreSettings:
        """Return the settings that `encoded` gave."""
        return cls(**{**fields, "indexed_fields": tuple(fields.get("indexed_fields", ()))})


_FORMAT_1 = ("store", "embedder", "fingerprint", "dim", "metric", "index")


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

    def chain(self, settings: StoreSettings) -> str:
        """Return the running hash over settings, content and every commit before, 64 hex digits."""
        fields = [
            self.previous,
            self.number,
            self.next_row,
            f"{self.content:032x}",
            self.documents,
            self.without_vector,
        ]
        return hashlib.sha256(json.dumps([settings.encoded(), fields], sort_keys=True).encode()).hexdigest()

    def record(self, settings: StoreSettings) -> CommitRecord:
        """Return what the commit record must say of it."""
        return CommitRecord(
            store=settings.store, commit=self.number, chain=self.chain(settings), format=settings.format
        )


@dataclass(frozen=True, slots=True)
class Change:
    """Rows that come and go in one commit; `vectors` are those of the added rows that have one."""

    added: Sequence[Row]
    vectors: Sequence[tuple[int, bytes]]
    removed: Sequence[Row]

    @classmethod
    def replacing(
        cls,
        documents: Sequence[Document],
        vectors: np.ndarray,
        removed: Sequence[Row],
        *,
        first: int,
        kind: str = "<f4",
    ) -> Change:
        """Return the change that stores `documents` under row numbers from `first` on, in place of rows `removed`.

        Args:
            documents: What is stored.
            vectors: Their vectors, float32 `(n_documents, dim)`; a row of zeros is none.
            removed: Rows that go.
            first: Row number of the first document.
            kind: Numpy's name of the numbers that are stored.
        """
        blobs = [vector.astype(kind).tobytes() if vector.any() else None for vector in vectors]
        added = [
            encode_row(first + place, document, blob, place=place)
            for place, (document, blob) in enumerate(zip(documents, blobs, strict=True))
        ]
        stored = [(row.number, blob) for row, blob in zip(added, blobs, strict=True) if blob is not None]
        return cls(added=added, vectors=stored, removed=removed)

    def apply(self, commit: Commit, settings: StoreSettings) -> Commit:
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
    """The ids that `delete` removed and those that it did not find.

    Attributes:
        deleted: How many documents were removed.
        not_found: The ids that were not there.
    """

    deleted: int
    not_found: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """The last acknowledged commit.

    Attributes:
        store: The store's identity, 32 hex digits.
        commit: Number of the commit, from 0 for the empty store.
        chain: Running hash over settings, content and all earlier commits, 64 hex digits.
        format: Format number of the store.
    """

    store: str
    commit: int
    chain: str
    format: int = 1

    def prepare(self, folder: Path) -> Path:
        """Write the record durably under a temporary name, so that only a rename is left once the commit is done."""
        fields = asdict(self)
        data = json.dumps({**fields, "check": _check(fields)}, indent=1).encode()
        with explained(folder / RECORD_FILE):
            return write_temporary(folder / RECORD_FILE, data)

    def acknowledge(self, folder: Path, prepared: Path) -> None:
        """Make the prepared record the valid one, durably."""
        with explained(folder / RECORD_FILE):
            publish(prepared, folder / RECORD_FILE)


def read_commit_record(folder: Path) -> CommitRecord:
    """Return the folder's commit record.

    Raises:
        CorruptStoreError: If it is missing or damaged.
        FormatTooNewError: If a newer version of this package wrote it.
    """
    path = folder / RECORD_FILE
    try:
        fields = json.loads(read_start(path, n_bytes=_RECORD_BYTES))
        check = fields.pop("check")
        if check != _check(fields):
            raise CorruptStoreError(path, "its checksum does not match")
        found = fields["format"]
    except OSError as exc:
        raise CorruptStoreError(path, f"it cannot be read ({exc.strerror})") from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CorruptStoreError(path, "it is not a commit record") from exc
    if not isinstance(found, int) or found > FORMAT:
        raise FormatTooNewError(folder, found=found, supported=FORMAT)
    return _parsed(path, fields, found)


def _parsed(path: Path, fields: dict[str, object], found: int) -> CommitRecord:
    store, commit, chain = fields.get("store"), fields.get("commit"), fields.get("chain")
    if (
        set(fields) == {"store", "commit", "chain", "format"}
        and isinstance(store, str)
        and isinstance(chain, str)
        and re.fullmatch("[0-9a-f]{32}", store)
        and re.fullmatch("[0-9a-f]{64}", chain)
        and isinstance(commit, int)
    ):
        return CommitRecord(store=store, commit=commit, chain=chain, format=found)
    raise CorruptStoreError(path, "it is not a commit record")


def _check(fields: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
