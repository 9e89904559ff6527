"""Everything that can go wrong with a store, one class for each cause.

StoreError
├── StoreNotFoundError            nothing at that path
├── StoreExistsError              `create` found something there
├── NotAStoreError                what is there is no store
├── FormatTooNewError             written by a newer version of this package
├── CorruptStoreError             the database or its commit record is damaged, missing, replaced or too short
├── EmbedderMismatchError         another embedding model than the one that built the store
├── StoreLockedError              another process writes to it
├── StoreReadOnlyError            a write on a read-only handle or file system
├── StoreFullError                no space left; the last commit is intact
├── StoreIOError                  the disk failed; the handle is dead until it is opened again
├── StoreClosedError              the handle was closed
├── ForkedHandleError             the handle was carried over a fork
├── FaissWheelsError              two FAISS packages are installed over each other
├── DuplicateIdError              (also InvalidInputError) an id is there already, or twice in one call
├── InvalidEmbeddingError         (also InvalidInputError) a vector with NaN, infinity, or nothing but zeros
└── DimensionMismatchError        (also InvalidInputError) vectors of another shape
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen_rerank.errors import InvalidInputError, StoreError


class StoreNotFoundError(StoreError):
    """Nothing is at that path."""


class StoreExistsError(StoreError):
    """`create` never opens and never overwrites."""


class NotAStoreError(StoreError):
    """Something is at that path, but it is no store."""


class FormatTooNewError(StoreError):
    """The store was written by a newer version of this package.

    Attributes:
        found: Format number of the store.
        supported: The highest format number that this version reads.
    """

    def __init__(self, path: Path, *, found: int, supported: int) -> None:
        super().__init__(
            f"{path} has store format {found}, but this version of qwen-rerank reads formats up to {supported}; "
            "upgrade qwen-rerank."
        )
        self.found = found
        self.supported = supported


class CorruptStoreError(StoreError):
    """The database is damaged, missing, replaced, or shorter than what was acknowledged.

    Attributes:
        file: The file that is wrong.
        reason: What is wrong with it.
    """

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(
            f"{file} is corrupt: {reason}; restore the store's folder from a backup or build it again from your "
            f"documents (qwen_rerank.store.verify_store({str(file.parent)!r}) lists what is damaged)."
        )
        self.file = file
        self.reason = reason


class EmbedderMismatchError(StoreError):
    """The embedder is not the one that built the store.

    Attributes:
        stored: Fingerprint of the embedder that built the store.
        given: Fingerprint of the embedder passed to `open`.
    """

    def __init__(self, stored: str, given: str) -> None:
        super().__init__(
            f"The store was built with embedder {stored!r}, but {given!r} was given; vectors of different embedders "
            "cannot be compared. Open it with the first, or create a new store with the second."
        )
        self.stored = stored
        self.given = given


class StoreLockedError(StoreError):
    """Another process, or another handle of this one, has the store open for writing.

    Attributes:
        pid: Process id of the holder, or None where it could not be read.
    """

    def __init__(self, path: Path, *, pid: int | None) -> None:
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"{path} is in use by {holder}; close it there, or open it here with read_only=True.")
        self.pid = pid


class StoreReadOnlyError(StoreError):
    """A write was asked of a read-only handle or a read-only file system."""


class StoreFullError(StoreError):
    """No space is left; nothing of the call was stored, reads go on, and writes work again once there is space."""


class StoreIOError(StoreError):
    """The operating system failed to read or write; what is on the disk is decided when the store is opened again."""


class StoreClosedError(StoreError):
    """The handle was closed."""


class ForkedHandleError(StoreError):
    """The handle belongs to the process that opened it; a forked child must open its own."""


class FaissWheelsError(StoreError):
    """Several FAISS packages own the same folder and break each other."""

    topic = "faiss"


class DuplicateIdError(StoreError, InvalidInputError):
    """An id is in the store already, or twice in one call; nothing of the call was stored.

    Attributes:
        ids: The ids concerned.
    """

    topic = ""  # the message says it all

    def __init__(self, ids: Sequence[str], where: str) -> None:
        shown = ", ".join(repr(one[:80]) for one in ids[:5]) + (", …" if len(ids) > 5 else "")
        super().__init__(f"{len(ids)} ids are {where}: {shown}; use upsert to replace documents.")
        self.ids = tuple(ids)


class InvalidEmbeddingError(StoreError, InvalidInputError):
    """A vector cannot be compared with anything; nothing of the call was stored.

    Attributes:
        row: 0-based row of the first such vector.
    """

    topic = ""  # the message says it all

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"vectors[{row}] {reason}; nothing was stored or searched.")
        self.row = row


class DimensionMismatchError(StoreError, InvalidInputError):
    """Vectors have another shape than the store needs.

    Attributes:
        expected: The shape that was needed, with None for any length.
        got: The shape that was given.
    """

    topic = ""  # the message says it all

    def __init__(self, expected: tuple[int | None, ...], got: tuple[int, ...]) -> None:
        wanted = ", ".join("n" if size is None else str(size) for size in expected)
        super().__init__(f"vectors must have shape ({wanted}), not {got}.")
        self.expected = expected
        self.got = got
