"""The connection to the SQLite database of a store: snapshots, transactions, and SQLite's errors as the store's."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qwen_rerank.errors import InvalidInputError, RerankError
from qwen_rerank.filters import moment
from qwen_rerank.store.errors import (
    CorruptStoreError,
    StoreFullError,
    StoreIOError,
    StoreLockedError,
    StoreReadOnlyError,
)
from qwen_rerank.store.seal import PageDigests

DATABASE_FILE = "documents.sqlite3"
JOURNAL_FILE = DATABASE_FILE + "-journal"
FOREIGN_FILES = (DATABASE_FILE + "-wal", DATABASE_FILE + "-shm")  # never ours, but SQLite would open them

_BUSY_S = 60.0


class DatabaseFile:
    """The file of one store's database, and a connection to it.

    SQLite's write-ahead log loses commits when its file is damaged or gone and had a bug that corrupts databases in
    versions before 3.51.3, so this is a rollback journal with `synchronous=EXTRA`: a commit is on stable storage, the
    journal's removal included, when it returns.

    Args:
        folder: The store's folder.
        read_only: Whether nothing will be written; a crashed writer's journal is rolled back even so where the
            file system allows it.
        writable: Whether the file system can be written.

    Attributes:
        pages: Digests of the file's pages; unknown until they are read.
    """

    def __init__(self, folder: Path, *, read_only: bool, writable: bool, create: bool = False) -> None:
        self.path = folder / DATABASE_FILE
        mode = "rwc" if create else "rw" if writable else "ro"
        self.pages = PageDigests(self.path)
        try:
            with self.explained():
                self._connection = sqlite3.connect(
                    f"file:{quote(str(self.path))}?mode={mode}",
                    uri=True,
                    timeout=_BUSY_S,
                    isolation_level=None,
                    check_same_thread=False,
                )
                try:
                    self._prepare(read_only=read_only, create=create)
                except BaseException:
                    self._connection.close()
                    raise
        except BaseException:
            self.pages.close()
            raise

    def _prepare(self, *, read_only: bool, create: bool) -> None:
        _configure(self._connection)
        self._connection.execute("PRAGMA cache_size = -32768")  # KiB; the inner pages of a million rows
        if create:
            self._connection.execute("PRAGMA page_size = 8192")
        if not read_only:
            self._connection.execute("PRAGMA journal_mode = DELETE")
            self._connection.execute("PRAGMA synchronous = EXTRA")
        else:
            self._connection.execute("PRAGMA query_only = ON")

    def close(self) -> None:
        """Close the database."""
        self._connection.close()
        self.pages.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise the store's error for every error of SQLite in the block."""
        try:
            yield
        except sqlite3.Error as exc:
            raise self._explain(exc) from exc
        except UnicodeDecodeError as exc:
            # A message of SQLite that quotes a damaged schema.
            raise CorruptStoreError(self.path, "its tables are not those of a store") from exc

    def _explain(self, error: sqlite3.Error) -> RerankError:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            return StoreFullError(f"No space is left for {self.path}; nothing was stored. Free some and try again.")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return StoreLockedError(self.path.parent, pid=None)
        if name.startswith("SQLITE_READONLY"):
            return StoreReadOnlyError(
                f"{self.path} cannot be written ({error}); if a writer crashed, open the store once where it can be."
            )
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_NOMEM")):
            return StoreIOError(f"{self.path} could not be read or written ({error}); open the store again to go on.")
        if name == "SQLITE_TOOBIG":
            return InvalidInputError(f"documents hold a text that is too long for SQLite ({error}); split it.")
        return CorruptStoreError(self.path, str(error))

    # Transactions

    @contextmanager
    def snapshot(self, *, patient: bool = True) -> Iterator[None]:
        """Hold one commit: everything read inside is of it; nested ones are part of the outer.

        Raises:
            StoreLockedError: If a writer is committing, after a minute or, when not `patient`, at once.
        """
        if self._connection.in_transaction:
            yield
            return
        with self.explained():
            self._connection.execute("BEGIN")
            try:
                if not patient:
                    self._connection.execute("PRAGMA busy_timeout = 0")
                    try:
                        self.settle()
                    finally:
                        self._connection.execute(f"PRAGMA busy_timeout = {_BUSY_S * 1000:.0f}")
                yield
            finally:
                self._roll_back()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Store everything that is written inside at its end, or nothing of it."""
        with self.explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self.pages.begin()
                yield
                self.pages.before_commit(self.path.with_name(JOURNAL_FILE))
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                self.pages.rolled_back()
                raise
            self.pages.committed()

    def _roll_back(self) -> None:
        # Some errors have rolled back already.
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def settle(self) -> None:
        """Read something, so that the snapshot begins now and a crashed writer's journal has been rolled back."""
        self._all("SELECT count(*) FROM sqlite_master")

    @contextmanager
    def _reader(self, *, locked: bool) -> Iterator[sqlite3.Connection]:
        """Give the connection, or another one that takes no lock and remembers nothing of what it read before."""
        if locked:
            yield self._connection
            return
        with self.explained():
            other = sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro&immutable=1", uri=True, isolation_level=None)
            try:
                _configure(other)
                yield other
            finally:
                other.close()

    def copy_to(self, path: Path) -> None:
        """Write a copy of the database as it is in this snapshot to a new file, durably."""
        with self.explained():
            copy = sqlite3.connect(path, isolation_level=None)
            try:
                self._connection.backup(copy)
            finally:
                copy.close()

    def shrink(self) -> None:
        """Give the space of deleted rows back to the file system, which writes every page anew."""
        with self.explained():
            self._connection.execute("VACUUM")

    def _all(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self.explained():
            return self._connection.execute(query, parameters).fetchall()


def _configure(connection: sqlite3.Connection) -> None:
    connection.text_factory = bytes
    # A hostile store can carry its own views and triggers. No pragma keeps them from running (`trusted_schema` would also
    # forbid the JSON functions of our indexes); `check_schema` compares the schema word for word before anything else is
    # read.
    connection.execute("PRAGMA cell_size_check = ON")
    connection.create_function("moment", 1, moment, deterministic=True)
