"""What stands before every call on an open store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_rerank.store.errors import ForkedHandleError, StoreClosedError, StoreIOError, StoreReadOnlyError


class Guard:
    """Lets one thread at a time use a handle, and nobody after a fork, a fault or the end.

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
        self._mutex = threading.RLock()
        self._closed = False
        self.fault: str | None = None

    @contextmanager
    def using(self, *, write: bool = False) -> Iterator[None]:
        """Use the handle.

        Raises:
            ForkedHandleError: In another process than the one that opened it.
            StoreClosedError: After `closing`.
            StoreIOError: After a fault.
            StoreReadOnlyError: If `write` and the handle is read-only.
        """
        if self._pid != os.getpid():
            raise ForkedHandleError(
                f"{self._folder} was opened by process {self._pid}; open it again in process {os.getpid()}."
            )
        with self._mutex:
            if self._closed:
                raise StoreClosedError(f"{self._folder} was closed; open it again with FaissStore.open.")
            if self.fault is not None:
                raise StoreIOError(f"{self._folder} failed before ({self.fault}); close it and open it again to go on.")
            if write and self._read_only:
                raise StoreReadOnlyError(f"{self._folder} was opened with read_only=True; open it without to write.")
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
        with self._mutex:
            first, self._closed = not self._closed, True
            yield first
