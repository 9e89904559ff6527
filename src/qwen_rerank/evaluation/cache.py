"""Scores kept on disk, so that an evaluation that broke off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.reranker import Reranker

_BATCH = 500  # below SQLite's oldest limit on the variables of one statement
_PATIENCE_S = 60.0  # how long another process may write


class ScoreCache:
    """Log-odds by a hash of everything that decides them.

    The hash covers the scorer's fingerprint (model, revision, template, length, dtype), instruction, long-document strategy, query
    and document. Safe to delete at any time. Several processes may share it.

    Args:
        path: SQLite file; made if it is not there.

    Raises:
        InvalidInputError: If the file is something else, damaged, or held by another process for too long.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(file, timeout=_PATIENCE_S)
            self._db.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, log_odds REAL) WITHOUT ROWID")
        except sqlite3.Error as exc:
            raise _unusable(file, exc) from exc
        self._file = file

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """Return key to log-odds of those that are known."""
        found: dict[bytes, float] = {}
        try:
            for start in range(0, len(keys), _BATCH):
                part = list(keys[start : start + _BATCH])
                marks = ",".join("?" * len(part))
                found.update(self._db.execute(f"SELECT key, log_odds FROM scores WHERE key IN ({marks})", part))
        except sqlite3.Error as exc:
            raise _unusable(self._file, exc) from exc
        return found

    def put(self, scores: dict[bytes, float]) -> None:
        """Keep scores, all or none of them."""
        try:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", scores.items())
        except sqlite3.Error as exc:
            raise _unusable(self._file, exc) from exc


def _unusable(file: Path, exc: sqlite3.Error) -> InvalidInputError:
    return InvalidInputError(
        f"{str(file)!r} cannot be used as a score cache ({exc}); wait for the process that uses it, delete it, or name another."
    )


def score_key(reranker: Reranker, query: str, text: str) -> bytes:
    """Return the key of one document's score under `reranker`."""
    parts = [sorted(reranker.calibration_key().items()), query, text]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8")).digest()
