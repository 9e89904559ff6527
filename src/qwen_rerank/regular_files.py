"""Opens regular files only: a pipe could be waited for for ever, and a device do something when it is opened."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

# Not on every system.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def open_regular(path: str | os.PathLike[str], *, links: bool = True) -> BufferedReader:
    """Return a regular file opened to read; `links` says whether one that a symbolic link leads to will do.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    check_kind(os.stat(path, follow_symlinks=links), path)
    descriptor = os.open(path, os.O_RDONLY | _NO_WAIT | _BINARY | (0 if links else _NO_LINK))
    try:
        check_kind(os.fstat(descriptor), path)  # it may have been replaced meanwhile
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], *, most_bytes: int | None = None, links: bool = True) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: As `open_regular`, or if it has more than `most_bytes`.
    """
    with open_regular(path, links=links) as file:
        data = file.read(-1 if most_bytes is None else most_bytes + 1)
    if most_bytes is not None and len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes:,} bytes", str(path))
    return data


def check_kind(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raise OSError unless this is what the system says of a regular file."""
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, "it is a symbolic link", str(Path(path)))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(Path(path)))
