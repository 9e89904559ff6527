"""Access to a store: one writer by a lock of the operating system, and what the threads of one handle may do at a time."""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_rerank.errors import StoreError
from qwen_rerank.store.errors import (
    ForkedHandleError,
    StoreClosedError,
    StoreIOError,
    StoreLockedError,
    StoreReadOnlyError,
)
from qwen_rerank.store.files import explain, explained

try:
    import fcntl
except ImportError:  # pragma: no cover - only on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "writer.lock"


class WriterLock:
    """Holds `writer.lock` of a folder until `release` or the end of the process.

    Args:
        folder: The store's folder.

    Raises:
        StoreLockedError: If another handle or process holds it.
    """

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            raise StoreError(
                "FaissStore needs POSIX file locks, which this platform does not have; use Linux or macOS."
            )
        path = folder / LOCK_FILE
        with explained(path):
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            self._acquire(folder, path)
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def _acquire(self, folder: Path, path: Path) -> None:
        descriptor = self._descriptor
        if descriptor is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            digits = re.match(rb"\d{1,19}", os.pread(descriptor, 20, 0))
            raise StoreLockedError(folder, pid=int(digits[0]) if digits else None) from exc
        except OSError as exc:  # a network file system without locks, for example
            raise explain(exc, path) from exc
        with explained(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let the next writer in."""
        if self._descriptor is not None:
            # Closing is not enough: a child forked a moment ago may not have come to drop its copy yet.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.drop()

    def drop(self) -> None:
        """Close this process's copy; the lock stays with whoever has another."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _drop_in_child() -> None:
    # A forked child shares the open file and would keep the lock alive after its parent's death. Closing the child's
    # copy leaves the parent's lock in place.
    for lock in list(_held):
        lock.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)


class Guard:
    """The guard of one handle: its threads keep out of each other's way, and nobody uses it after a fork, a fault or the end.

    There are two locks. Whoever holds the connection uses the database. The indexes in memory are changed by who holds
    both, and read by who holds either. A search takes that of the indexes and, if nobody has it just now, the connection;
    so it never waits for a commit.

    Args:
        folder: The store's folder.
        read_only: Whether writing is refused.

    Attributes:
        fault: Why the store must be opened again, or None.
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self._folder = folder
        self._read_only = read_only
        self._pid = os.getpid()
        self._connection = threading.RLock()  # always before that of the indexes
        self._indexes = threading.RLock()
        self._closed = False
        self.fault: str | None = None

    @contextmanager
    def using(self, *, write: bool = False) -> Iterator[None]:
        """Use the database.

        Raises:
            ForkedHandleError: In another process than the one that opened it.
            StoreClosedError: After `closing`.
            StoreIOError: After a fault.
            StoreReadOnlyError: If `write` and the handle is read-only.
        """
        self._check_process()
        with self._connection, self._sound():
            if write and self._read_only:
                raise StoreReadOnlyError(f"{self._folder} was opened with read_only=True; open it without to write.")
            yield

    @contextmanager
    def searching(self) -> Iterator[bool]:
        """Read the indexes in memory; gives whether the database can be used too, because nobody else does.

        Raises:
            ForkedHandleError: In another process than the one that opened it.
            StoreClosedError: After `closing`.
            StoreIOError: After a fault.
        """
        self._check_process()
        with self._indexes:
            alone = self._connection.acquire(blocking=False)
            try:
                with self._sound():
                    yield alone
            finally:
                if alone:
                    self._connection.release()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the indexes in memory; to be called inside `using`."""
        with self._indexes:
            yield

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ForkedHandleError(
                f"{self._folder} was opened by process {self._pid}; open it again in process {os.getpid()}."
            )

    @contextmanager
    def _sound(self) -> Iterator[None]:
        if self._closed:
            raise StoreClosedError(f"{self._folder} was closed; open it again with FaissStore.open.")
        if self.fault is not None:
            raise StoreIOError(f"{self._folder} failed before ({self.fault}); close it and open it again to go on.")
        try:
            yield
        except StoreIOError as exc:
            # After a failed fsync the kernel forgets what was not written, so trying again proves nothing.
            self.fault = str(exc)
            raise

    @contextmanager
    def closing(self) -> Iterator[bool]:
        """End the handle; gives whether there is anything to end: not twice, and not in a forked child."""
        if self._pid != os.getpid():
            yield False
            return
        with self._connection, self._indexes:
            first, self._closed = not self._closed, True
            yield first
