"""The FAISS file of a store, kept in step with its database: read, caught up or rebuilt, and never an error."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from qwen_rerank.store.commits import RECORD_FILE
from qwen_rerank.store.database import Database
from qwen_rerank.store.files import TEMPORARY, explained, publish, sha256, sync_file
from qwen_rerank.store.index import VectorIndex

_log = logging.getLogger(__name__)

_FILE = re.compile(r"index-[0-9a-f]{16}\.faiss")
_CHUNK = 20_000  # vectors read from the database at a time
_SAVE_AFTER = 50_000  # vectors added since the file was written, and a quarter of all


class IndexFile:
    """The index of one open store and the file that it is saved to.

    The name and hash of the file are in the database, so a file that is missing, damaged, older or another store's is
    noticed before FAISS reads a byte of it.

    Args:
        folder: The store's folder.
        database: The store's database.
        empty: Makes an empty index.
    """

    def __init__(self, folder: Path, database: Database, empty: Callable[[], VectorIndex]) -> None:
        self._folder = folder
        self._database = database
        self._empty = empty
        self.index = empty()
        self._unsaved = 0

    @property
    def saved(self) -> bool:
        """Whether the file holds all there is."""
        return self._unsaved == 0

    def load(self) -> None:
        """Read the file and catch up with the database; without a good file, rebuild from the database."""
        bound = self._database.index_file()
        expected = self._database.count("vector_digest IS NOT NULL")
        if bound is not None:
            try:
                self._read(*bound)
            except (OSError, ValueError) as exc:
                _log.warning("The FAISS file of %s is not usable (%s); it is built again.", self._folder, exc)
                self.index = self._empty()
        self.catch_up()
        if bound is None and expected:
            _log.info("The FAISS index of %s was built from its %d vectors.", self._folder, expected)

    def _read(self, name: str, digest: str) -> None:
        if not _FILE.fullmatch(name):
            raise ValueError(f"its name is {name!r}")
        path = self._folder / name
        if sha256(path) != digest:
            raise ValueError(f"the hash of {name} does not match")
        self.index.read(path)

    def catch_up(self) -> None:
        """Make the index hold just the vectors of the database's current commit."""
        wanted = self._database.vector_rows()
        have = self.index.rows()
        # Rows never change and their numbers are never given twice, so the two sets tell all.
        gone = np.setdiff1d(have, wanted, assume_unique=True)
        new = np.setdiff1d(wanted, have, assume_unique=True)
        if len(new) and new[0] <= self.index.last_row():
            self.index, gone, new = self._empty(), gone[:0], wanted
        if not self.index.exact and len(new) and not len(have):
            _log.warning("The %s graph of %s is built anew; its results may differ.", self.index.factory, self._folder)
        if len(gone):
            self.remove(gone)
        for start in tqdm(range(0, len(new), _CHUNK), desc="index", unit_scale=_CHUNK, disable=_few(new)):
            rows = new[start : start + _CHUNK]
            self.add(rows, self._database.vectors(rows, dim=self.index.dim))

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors that the database has stored."""
        self.index.add(rows, vectors)
        self._unsaved += len(rows)

    def remove(self, rows: np.ndarray) -> None:
        """Remove rows that the database no longer has."""
        self.index.remove(rows)
        self._unsaved += len(rows)

    def rebuild(self) -> None:
        """Build the index from the database, without dead vectors."""
        self.index = self._empty()
        self._unsaved = 1
        self.catch_up()

    def due(self) -> bool:
        """Whether so much has changed that a crash now would cost a long catching up."""
        return self._unsaved > max(_SAVE_AFTER, len(self.index) // 4)

    def save(self) -> None:
        """Write the file, bind it to the database, and remove the one before.

        Raises:
            StoreError: If it cannot be written; the database is as it was.
        """
        path = self._folder / f"index-{secrets.token_hex(8)}.faiss"
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            # Written, fsynced, hashed, renamed, and only then named by the database: a crash in between leaves a file that
            # nothing names, and the one before stays valid.
            self.index.write(temporary)
            with explained(path):
                sync_file(temporary)
                digest = sha256(temporary)
                publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._database.bind_index_file(path.name, digest)
        self._unsaved = 0
        self.remove_orphans()

    def remove_orphans(self) -> None:
        """Remove what a crash left: temporary files, and FAISS files that the database does not name."""
        bound = self._database.index_file()
        keep = bound[0] if bound else None
        try:
            for path in self._folder.iterdir():
                name = path.name.removesuffix(TEMPORARY)
                ours = _FILE.fullmatch(name) or name == RECORD_FILE
                if ours and path.name not in (keep, RECORD_FILE):
                    path.unlink(missing_ok=True)
        except OSError as exc:
            # They cost space and nothing else; the next one to open the store tries again.
            _log.warning("A file that is no longer needed could not be removed: %s", exc)


def _few(rows: np.ndarray) -> bool | None:
    # None: silent when not on a terminal.
    return True if len(rows) <= _CHUNK else None
