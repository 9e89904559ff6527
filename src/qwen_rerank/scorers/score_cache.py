"""`ScoreCache`: scores that were computed before, in memory and by option in a file."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.regular_files import open_regular
from qwen_rerank.sharing import SharedCopies, made_from, renew_in_child

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 100_000  # scores in memory, about 300 bytes each
_FILE_SIZE = 5_000_000  # scores in the file, about 100 bytes each
_BATCH = 500  # below SQLite's oldest limit on the variables of one statement
_PATIENCE_S = 5.0  # how long another process may write
_APPLICATION_ID = 0x51525343  # "QRSC", in the file's header: what has it may be deleted by us
_APPLICATION_ID_AT = 68
_TABLE = "kept_scores"


class KeptScore(NamedTuple):
    """One document's score as it is kept.

    Attributes:
        log_odds: Log-odds of relevance.
        tokens: Prompt tokens that were read; -1 where nobody can tell.
        kept_chars: Characters of the document that were read; -1 where nobody can tell.
    """

    log_odds: float
    tokens: int = -1
    kept_chars: int = -1


class ScoreCache(SharedCopies):
    """Scores by a hash of everything that decides them; texts are never kept. Thread-safe.

    The least recently used go first. A file may be deleted at any time and shared by several processes; a damaged one is
    dropped with a warning, and a row that does not match its checksum is not there.

    Args:
        path: SQLite file; made if it is not there. None keeps scores in memory alone.
        size: Scores in memory.

    Attributes:
        hits: Scores that were found.
        misses: Scores that were not.

    Raises:
        InvalidInputError: If the file is something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, size: int = DEFAULT_SIZE) -> None:
        self._size = check_count("size", size)
        self._memory: OrderedDict[bytes, KeptScore] = OrderedDict()
        self._lock = threading.RLock()
        self._file = None if path is None else Path(path)
        self._db = None if self._file is None else _open(self._file)
        self._parents: sqlite3.Connection | None = None
        self.hits = self.misses = 0
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child: take a lock and a connection of its own; SQLite's must not cross a fork, not even to be closed."""
        self._lock = threading.RLock()
        self._parents, self._db = self._db, None
        if self._parents is not None and self._file is not None:
            try:
                self._db = _connect(self._file)
            except sqlite3.Error as exc:
                logger.warning("the score cache %s cannot be used in this process (%s).", self._file, exc)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle path and size; what is in memory stays here."""
        path = None if self._file is None else str(self._file.absolute())
        return made_from, (type(self), {"path": path, "size": self._size})

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what is in memory stays."""
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    def __len__(self) -> int:
        """Return how many scores are in memory."""
        return len(self._memory)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, KeptScore]:
        """Return key to score of those that are known."""
        with self._lock:
            found = self.peek(keys)
            missing = [key for key in keys if key not in found]
            if missing and self._db is not None:
                read = self._guarded(lambda db: _read(db, missing)) or {}
                self._remember(read)
                found |= read
            self.hits += len(found)
            self.misses += len(keys) - len(found)
        return found

    def peek(self, keys: Iterable[bytes]) -> dict[bytes, KeptScore]:
        """Return those that are known in memory, uncounted."""
        with self._lock:
            found = {key: self._memory[key] for key in keys if key in self._memory}
            for key in found:
                self._memory.move_to_end(key)
        return found

    def put(self, scores: Mapping[bytes, KeptScore]) -> None:
        """Keep scores."""
        if not scores:
            return
        with self._lock:
            self._remember(scores)
            self._guarded(lambda db: _write(db, scores))

    def _remember(self, scores: Mapping[bytes, KeptScore]) -> None:
        self._memory.update(scores)
        while len(self._memory) > self._size:
            self._memory.popitem(last=False)

    def _guarded(
        self, work: Callable[[sqlite3.Connection], dict[bytes, KeptScore] | None]
    ) -> dict[bytes, KeptScore] | None:
        """Do something with the file; where it cannot be done the scores are computed, never guessed."""
        if self._db is None or self._file is None:
            return None
        try:
            return work(self._db)
        except sqlite3.OperationalError as exc:  # held by another process, a full disk
            if getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_DBMOVED:
                logger.warning("the score cache %s was deleted and is made anew.", self._file)
                self._reopen(self._file, _open)
            else:
                logger.warning("the score cache %s cannot be used now (%s).", self._file, exc)
        except sqlite3.Error as exc:
            logger.warning("the score cache %s is damaged (%s) and is dropped.", self._file, exc)
            self._reopen(self._file, _anew)
        return None

    def _reopen(self, file: Path, way: Callable[[Path], sqlite3.Connection]) -> None:
        """Open the file again; without one that can be had, scores stay in memory alone."""
        if self._db is not None:
            self._db.close()
        self._db = None
        try:
            self._db = way(file)
        except InvalidInputError as exc:
            logger.warning("%s Scores stay in memory.", exc)


def score_key(fingerprint: str, instruction: str | None, query: str, text: str) -> bytes:
    """Return the key of one document's score: a hash over all that decides it, each part with its length."""
    digest = hashlib.blake2b(digest_size=24)
    for part in (fingerprint, instruction, query, text):
        data = b"" if part is None else part.encode("utf-8")
        digest.update(struct.pack("<q", -1 if part is None else len(data)))
        digest.update(data)
    return digest.digest()


def _open(file: Path) -> sqlite3.Connection:
    """Return the opened file; one of ours that is damaged is made anew.

    Raises:
        InvalidInputError: If it is something else, or cannot be had.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        ours = not file.exists() or _is_ours(file)
    except OSError as exc:
        raise InvalidInputError(f"{str(file)!r} cannot be used as a score cache ({exc}); name another file.") from exc
    if not ours:
        raise InvalidInputError(f"{str(file)!r} is no score cache; name another file, or delete it.")
    try:
        return _connect(file)
    except sqlite3.OperationalError as exc:
        raise InvalidInputError(
            f"{str(file)!r} cannot be used as a score cache ({exc}); wait for the process that uses it, or name another."
        ) from exc
    except sqlite3.Error as exc:
        logger.warning("the score cache %s is damaged (%s) and is made anew.", file, exc)
        return _anew(file)


def _is_ours(file: Path) -> bool:
    """Whether a file is empty or says in its header that it is a score cache."""
    with open_regular(file) as opened:
        head = opened.read(_APPLICATION_ID_AT + 4)
    return not head or head[_APPLICATION_ID_AT:] == struct.pack(">I", _APPLICATION_ID)


def _anew(file: Path) -> sqlite3.Connection:
    try:
        for name in (file, file.with_name(f"{file.name}-journal")):
            name.unlink(missing_ok=True)
        return _connect(file)
    except (OSError, sqlite3.Error) as exc:  # its folder cannot be written, or on Windows another process has it open
        raise InvalidInputError(f"{str(file)!r} cannot be made anew as a score cache ({exc}); name another.") from exc


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, timeout=_PATIENCE_S, check_same_thread=False, isolation_level=None)
    try:
        # A crash may damage the file: that costs the scores, which can be computed again.
        db.execute("PRAGMA synchronous=OFF")
        if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {_TABLE} (place INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, "
            "log_odds REAL, tokens INTEGER, kept_chars INTEGER, checksum BLOB)"
        )
    except sqlite3.Error:
        db.close()
        raise
    return db


def _read(db: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, KeptScore]:
    found: dict[bytes, KeptScore] = {}
    for start in range(0, len(keys), _BATCH):
        part = list(keys[start : start + _BATCH])
        marks = ",".join("?" * len(part))
        rows = db.execute(
            f"SELECT key, log_odds, tokens, kept_chars, checksum FROM {_TABLE} WHERE key IN ({marks})", part
        )
        for key, log_odds, tokens, kept_chars, checksum in rows:
            score = KeptScore(log_odds, tokens, kept_chars)
            if checksum and _checksum(key, score) == checksum:
                found[key] = score
    return found


def _write(db: sqlite3.Connection, scores: Mapping[bytes, KeptScore]) -> None:
    rows = [(key, *score, _checksum(key, score)) for key, score in scores.items()]
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executemany(
            f"INSERT OR REPLACE INTO {_TABLE} (key, log_odds, tokens, kept_chars, checksum) VALUES (?, ?, ?, ?, ?)",
            rows,
        )
        # Places rise, so what is far behind the last one is the oldest.
        db.execute(f"DELETE FROM {_TABLE} WHERE place <= (SELECT max(place) FROM {_TABLE}) - ?", (_FILE_SIZE,))
        db.execute("COMMIT")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _checksum(key: bytes, score: KeptScore) -> bytes:
    """Return the checksum of a row; nothing where its values are of no such kind."""
    try:
        data = key + struct.pack("<dqq", *score)
    except (struct.error, TypeError):
        return b""
    return hashlib.blake2b(data, digest_size=8).digest()
