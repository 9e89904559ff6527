"""The seal of a store: a digest of the database file as its last commit left it, so that opening need not check each row.

Every page of the file has a digest. A writer knows which pages a commit wrote, digests those alone, and notes the sum of all
digests in a small file. A database file that has this sum is, byte for byte, what was checked or written before. A seal
that does not fit proves nothing: the file may be damaged, or a crash came between a commit and its seal. Then every row
is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qwen_rerank.regular_files import open_regular
from qwen_rerank.store.commits import Commit, CommitRecord, StoreSettings
from qwen_rerank.store.files import read_start

SEAL_FILE = "seal.json"
_SEAL_BYTES = 1024  # always as long, so that one write replaces it
_AT_ONCE = 16 << 20  # bytes of the database file read at a time by one thread
_MAX_THREADS = 4
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The state of a database file at a commit.

    Attributes:
        store: Identity of the store.
        commit: Number of the commit.
        chain: Its running hash.
        content: Sum of the digests of all rows, as 32 hex digits.
        documents: How many rows there are.
        without_vector: How many of them have no vector.
        pages: Digest of the database file, 64 hex digits.
    """

    store: str
    commit: int
    chain: str
    content: str
    documents: int
    without_vector: int
    pages: str

    @classmethod
    def of(cls, commit: Commit, settings: StoreSettings, pages: str) -> Seal:
        """Return the seal of a database file at a commit."""
        return cls(
            store=settings.store,
            commit=commit.number,
            chain=commit.chain(settings),
            content=f"{commit.content:032x}",
            documents=commit.documents,
            without_vector=commit.without_vector,
            pages=pages,
        )

    def names(self, record: CommitRecord) -> bool:
        """Return whether it is of the commit that was acknowledged last."""
        return (self.store, self.commit, self.chain) == (record.store, record.commit, record.chain)

    def write(self, folder: Path) -> None:
        """Write it, or leave it: without one the next `open` takes longer, and nothing else."""
        fields = asdict(self)
        data = json.dumps({**fields, "check": _check(fields)}).encode().ljust(_SEAL_BYTES)
        with suppress(OSError):
            descriptor = os.open(folder / SEAL_FILE, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(descriptor, data, 0)
            finally:
                os.close(descriptor)


def read_seal(folder: Path) -> Seal | None:
    """Return the seal of a store's folder; None where there is none that can be read."""
    try:
        fields = json.loads(read_start(folder / SEAL_FILE, n_bytes=_SEAL_BYTES))
        check = fields.pop("check")
        seal = Seal(**fields)
        int(seal.content, 16)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    counts = (seal.commit, seal.documents, seal.without_vector)
    return seal if check == _check(fields) and all(isinstance(one, int) for one in counts) else None


def _check(fields: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class _Shared:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 0


_shared: dict[tuple[int, int], _Shared] = {}
_shared_lock = threading.Lock()


class PageDigests:
    """The digests of a database file's pages, kept in step with the transactions of one connection.

    Whatever goes wrong here makes them unknown and is no error.

    Args:
        path: The database file. Make this before and close it after SQLite's connection.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._page_bytes = 0
        self._digests: np.ndarray | None = None  # uint64 (n_pages, 4); None while unknown
        self._before: np.ndarray | None = None  # those before the transaction that is going on
        self._free: set[int] = set()
        self._written: set[int] = set()
        # Closing any descriptor of a file takes from the whole process the locks that SQLite holds on it. So all
        # connections to a file share one, which is closed after the last of them.
        with _shared_lock:
            try:
                key = _identity(os.stat(path, follow_symlinks=False))
                if key not in _shared:
                    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    key = _identity(os.fstat(descriptor))
                    _shared.setdefault(key, _Shared(descriptor))
                self._key: tuple[int, int] | None = key
                self._descriptor = _shared[key].descriptor
                _shared[key].users += 1
            except OSError:
                self._key = None

    def close(self) -> None:
        """Let the file go."""
        self._digests = self._before = None
        with _shared_lock:
            if self._key is not None:
                _shared[self._key].users -= 1
                if not _shared[self._key].users:
                    os.close(_shared.pop(self._key).descriptor)
                self._key = None

    def total(self) -> str | None:
        """Return the digest of the whole file, 64 hex digits; None if it is not known."""
        if self._digests is None:
            return None
        sums = self._digests.sum(axis=0, dtype=np.uint64).astype("<u8").tobytes()
        return hashlib.sha256(b"%d %d " % (self._page_bytes, len(self._digests)) + sums).hexdigest()

    def read(self) -> None:
        """Digest the whole file; to be called while a snapshot or the writer's lock keeps it as it is."""
        self._digests = None
        with suppress(OSError, ValueError):
            if self._key is None or self._key != _identity(os.stat(self._path, follow_symlinks=False)):
                return
            self._page_bytes = self._header()[0]
            count = self._count()
            digests = np.empty((count, 4), dtype=np.uint64)
            step = _AT_ONCE // self._page_bytes
            spans = [(start, min(start + step, count)) for start in range(0, count, step)]

            def fill(span: tuple[int, int]) -> None:
                digests[span[0] : span[1]] = self._digested(*span)

            if len(spans) == 1:
                fill(spans[0])
            else:
                with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
                    list(pool.map(fill, spans))
            self._digests = digests

    # A transaction

    def begin(self) -> None:
        """Note, inside a transaction that has written nothing yet, what is needed to know what it writes."""
        self._before, self._digests = self._digests, None
        self._written = set()
        if self._before is not None:
            self._attempt(self._note_free)

    def before_commit(self, journal: Path) -> None:
        """Note which pages the transaction changed: SQLite kept what they were in its journal."""
        if self._before is not None:
            self._attempt(lambda: self._written.update(_journaled(journal, self._page_bytes)))

    def rolled_back(self) -> None:
        """The file is what it was."""
        self._digests, self._before = self._before, None

    def committed(self) -> None:
        """Digest what was written."""
        if self._before is not None:
            self._attempt(self._follow)
        self._digests, self._before = self._before, None

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (OSError, ValueError, struct.error):
            self._before = None

    def _note_free(self) -> None:
        self._free = self._free_pages()

    def _follow(self) -> None:
        if self._before is None:
            return
        page_bytes, pages = self._header()
        if page_bytes != self._page_bytes:
            raise ValueError("the page size has changed")
        count = self._count()
        digests = np.zeros((count, 4), dtype=np.uint64)
        kept = min(count, len(self._before))
        digests[:kept] = self._before[:kept]
        # Pages that were free are written without a word in the journal; the first one counts the changes.
        used = self._free - self._free_pages() if self._free else set()
        grown = range(len(self._before) + 1, max(count, pages) + 1)
        for number in {1, *self._written, *used, *grown}:
            if number <= count:
                digests[number - 1] = self._digested(number - 1, number)[0]
        self._before = digests

    # The file

    def _header(self) -> tuple[int, int]:
        """Return the size of a page in bytes and the number of pages."""
        head = os.pread(self._descriptor, 100, 0)
        # With a write-ahead log (2) the file would not be all there is.
        if len(head) < 100 or head[:16] != b"SQLite format 3\0" or head[18:20] != b"\1\1":
            raise ValueError("it is no database with a rollback journal")
        size = int.from_bytes(head[16:18])
        return (65536 if size == 1 else size), int.from_bytes(head[28:32])

    def _count(self) -> int:
        count, rest = divmod(os.fstat(self._descriptor).st_size, self._page_bytes)
        if rest:
            raise ValueError("it ends inside a page")
        return count

    def _digested(self, start: int, end: int) -> np.ndarray:
        """Return the digests of pages from `start`, counted from 0, to `end`, uint64 `(n_pages, 4)`."""
        size = self._page_bytes
        data = memoryview(os.pread(self._descriptor, (end - start) * size, start * size))
        if len(data) != (end - start) * size:
            raise ValueError("it is shorter than it was")
        out = bytearray()
        for number in range(start, end):
            # The number too, so that two pages that change places are noticed.
            digest = hashlib.sha256(number.to_bytes(8))
            digest.update(data[(number - start) * size : (number - start + 1) * size])
            out += digest.digest()
        return np.frombuffer(out, dtype="<u8").astype(np.uint64).reshape(-1, 4)

    def _free_pages(self) -> set[int]:
        """Return the numbers of the pages on the free list, from 1, but for those that hold the list."""
        trunk, count = struct.unpack(">II", os.pread(self._descriptor, 8, 32))
        found: set[int] = set()
        while trunk and len(found) < count:
            page = os.pread(self._descriptor, self._page_bytes, (trunk - 1) * self._page_bytes)
            trunk, leaves = struct.unpack(">II", page[:8])
            if leaves > self._page_bytes // 4 - 2:
                raise ValueError("the free list is damaged")
            found.update(np.frombuffer(page, ">u4", leaves, 8).tolist())
            count -= 1  # the trunk itself
        return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _journaled(path: Path, page_bytes: int) -> set[int]:
    """Return the numbers, from 1, of the pages that SQLite's rollback journal holds."""
    try:
        file = open_regular(path, links=False)
    except FileNotFoundError:
        return set()  # nothing that was there has changed
    found: set[int] = set()
    with file:
        descriptor, stride, offset = file.fileno(), page_bytes + 8, 0
        size = os.fstat(descriptor).st_size
        while offset + 28 <= size:
            magic, count, _, _, sector, of_page = struct.unpack(">8s5I", os.pread(descriptor, 28, offset))
            if magic not in (_JOURNAL_MAGIC, bytes(8)) or of_page != page_bytes or not 28 <= sector <= 65536:
                raise ValueError("it is no rollback journal of this database")
            start = offset + sector
            if magic != _JOURNAL_MAGIC or count == 0xFFFFFFFF:  # the last part, which was not synced yet
                count = max(0, size - start) // stride
            for place in range(start, start + count * stride, stride):
                found.add(int.from_bytes(os.pread(descriptor, 4, place)))
            offset = -(-(start + count * stride) // sector) * sector
    return found
