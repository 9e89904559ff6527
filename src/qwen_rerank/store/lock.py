"""One writer at a time: an advisory lock that the operating system drops with its holder."""

from __future__ import annotations

import os
import re
import weakref
from pathlib import Path

from qwen_rerank.errors import StoreError
from qwen_rerank.store.errors import StoreLockedError
from qwen_rerank.store.files import explained

try:
    import fcntl
except ImportError as exc:  # pragma: no cover - only on Windows
    raise StoreError(
        "FaissStore needs POSIX file locks, which this platform does not have; use Linux or macOS."
    ) from exc

NAME = "writer.lock"


class WriterLock:
    """Holds `writer.lock` of a folder until `release` or the end of the process.

    Args:
        folder: The store's folder.

    Raises:
        StoreLockedError: If another handle or process holds it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
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


os.register_at_fork(after_in_child=_drop_in_child)
