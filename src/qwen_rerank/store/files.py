"""Durable writes: files that are wholly there or not at all, and the operating system's errors as store errors."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_rerank.errors import StoreError
from qwen_rerank.regular_files import check_kind, open_regular
from qwen_rerank.store.errors import StoreFullError, StoreIOError, StoreReadOnlyError

TEMPORARY = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def explain(error: OSError, path: Path) -> StoreError:
    """Return the store's error for one of the operating system's."""
    if error.errno in _FULL:
        return StoreFullError(f"No space is left for {path} ({error}); free some and try again.")
    if error.errno in _READ_ONLY:
        return StoreReadOnlyError(f"{path} cannot be written ({error}); open the store with read_only=True.")
    return StoreIOError(f"{path} could not be read or written ({error}); open the store again to go on.")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise the store's error for every OSError of the block."""
    try:
        yield
    except OSError as exc:
        raise explain(exc, path) from exc


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable; until then a power loss can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file durable that somebody else wrote and closed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_temporary(path: Path, data: bytes) -> Path:
    """Write `data` durably beside `path` under a temporary name and return that name."""
    # Beside its final place, because a rename is atomic within one file system only. O_EXCL and O_NOFOLLOW: a link that
    # somebody put there is never written through.
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a durable temporary file its name, durably."""
    # The content was fsynced before: a rename can reach the disk first, and then names an empty file after a power loss.
    os.replace(temporary, path)
    sync_folder(path.parent)


def check_regular(path: Path) -> None:
    """Raise OSError where there is something other than a regular file: a link, a pipe or a device."""
    # Not opened: closing a file again would give up the locks that SQLite holds on it in this process.
    if os.path.lexists(path):
        check_kind(os.lstat(path), path)


def read_start(path: Path, *, n_bytes: int) -> bytes:
    """Return the first bytes of a regular file."""
    with open_regular(path, links=False) as file:
        return file.read(n_bytes)


def sha256(path: Path) -> str:
    """Return the hex digest of a regular file."""
    with open_regular(path, links=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
