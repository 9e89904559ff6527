"""The index files of a store, of vectors and of words, kept in step with its database: read, caught up or rebuilt."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from qwen_rerank.store.commits import RECORD_FILE
from qwen_rerank.store.database import Database
from qwen_rerank.store.files import TEMPORARY, explained, publish, sha256, sync_file
from qwen_rerank.store.index import VectorIndex

_log = logging.getLogger(__name__)

_CHUNK = 20_000  # rows read from the database at a time
_SAVE_AFTER = 50_000  # rows added since the file was written, and a quarter of all


class RowIndex(Protocol):
    """An index over what the database holds of its rows."""

    def __len__(self) -> int:
        """Return how many rows a search can give."""
        ...

    def rows(self) -> np.ndarray:
        """Return the row numbers that a search can give, int64, ascending."""
        ...

    def last_row(self) -> int:
        """Return the highest row number that it holds, removed ones included; 0 when empty."""
        ...

    def add(self, rows: np.ndarray, items: Any, /) -> None:
        """Add one item a row, under row numbers above every one before."""
        ...

    def remove(self, rows: np.ndarray) -> None:
        """Remove these rows; unknown ones are ignored."""
        ...

    def read(self, path: Path) -> None:
        """Take the content of a file that was verified; ValueError if it is not an index of this kind."""
        ...

    def write(self, path: Path) -> None:
        """Write the index."""
        ...


@dataclass(frozen=True, slots=True)
class IndexKind:
    """The vectors that an index is over, by their settings.

    Attributes:
        name: Of the index, for people.
        file: Pattern of its files' names.
        condition: SQL condition of the rows that it holds.
        items: Returns what it holds of some rows of a database.
    """

    name: str
    file: re.Pattern[str]
    condition: str
    items: Callable[[Database, np.ndarray], Any]

    def new_name(self) -> str:
        """Return a file name that was never used."""
        return self.file.pattern.replace(_DIGITS, secrets.token_hex(8)).replace("\\", "")


_DIGITS = "[0-9a-f]{16}"
VECTORS = IndexKind("FAISS", re.compile(rf"index-{_DIGITS}\.faiss"), "vector_digest IS NOT NULL", Database.vectors)
WORDS = IndexKind("words", re.compile(rf"words-{_DIGITS}\.bin"), "1", Database.texts)
KINDS = (VECTORS, WORDS)

Index = TypeVar("Index", bound=RowIndex)


class IndexFile(Generic[Index]):
    """An index of one open store and the file that it is saved to.

    The name and hash of the file are in the database, so a file that is missing, damaged, older or another store's is
    noticed before a byte of it is used.

    Args:
        folder: The store's folder.
        database: The store's database.
        kind: What the index is over.
        empty: Makes an empty index.
    """

    def __init__(self, folder: Path, database: Database, kind: IndexKind, empty: Callable[[], Index]) -> None:
        self._folder = folder
        self._database = database
        self._kind = kind
        self.empty = empty
        self.index = empty()
        self._unsaved = 0
        self.found = False  # whether `load` had a good file

    @property
    def saved(self) -> bool:
        """Whether the file holds all there is."""
        return self._unsaved == 0

    def load(self, count: int | None = None) -> None:
        """Read the file and catch up with the database; without a good file, rebuild from the database.

        Args:
            count: How many rows the database has for it, where that is known.
        """
        bound = self._database.index_files()
        for name, digest in bound.items():
            if self._kind.file.fullmatch(name) or not any(kind.file.fullmatch(name) for kind in KINDS):
                try:
                    self._read(name, digest)
                    self.found = True
                except (OSError, ValueError, KeyError, TypeError) as exc:
                    text = "The %s file of %s is not usable (%s); it is built again."
                    _log.warning(text, self._kind.name, self._folder, exc)
                    self.index = self.empty()
        # A row that came later has a higher number, and without one the rest can only have become fewer.
        same = count == len(self.index) and self.index.last_row() == self._database.last_row(self._kind.condition)
        if not same:
            self.catch_up()
        if not bound and len(self.index):
            _log.info("The %s index of %s was built from %d rows.", self._kind.name, self._folder, len(self.index))

    def _read(self, name: str, digest: str) -> None:
        if not self._kind.file.fullmatch(name):
            raise ValueError(f"its name is {name!r}")
        path = self._folder / name
        if sha256(path) != digest:
            raise ValueError(f"the hash of {name} does not match")
        self.index.read(path)

    def catch_up(self) -> None:
        """Make the index hold just the rows of the database's current commit."""
        wanted = self._database.matching_rows(self._kind.condition)
        have = self.index.rows()
        # Rows never change and their numbers are never given twice, so the two sets tell all.
        gone = np.setdiff1d(have, wanted, assume_unique=True)
        new = np.setdiff1d(wanted, have, assume_unique=True)
        if len(new) and new[0] <= self.index.last_row():
            self.index, gone, new = self.empty(), gone[:0], wanted
        if len(gone):
            self.remove(gone)
        if isinstance(self.index, VectorIndex) and not self.index.last_row() and len(new):
            self.index.start(len(new), lambda count: self._sample(new, count))
            if not self.index.exact:
                _log.warning("The %s index of %s is built anew; its results may differ.", self.index.kind, self._folder)
        for start in shown(range(0, len(new), _CHUNK), self._kind.name):
            rows = new[start : start + _CHUNK]
            self.add(rows, self._kind.items(self._database, rows))

    def _sample(self, rows: np.ndarray, count: int) -> np.ndarray:
        # Always the same ones, so that an index that is built again is the same again.
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:count])
        return np.asarray(self._kind.items(self._database, rows[chosen]))

    def add(self, rows: np.ndarray, items: Any) -> None:
        """Add what the database has stored under these rows."""
        self.index.add(rows, items)
        self._unsaved += len(rows)

    def remove(self, rows: np.ndarray) -> None:
        """Remove rows that the database no longer has."""
        self.index.remove(rows)
        self._unsaved += len(rows)

    def replace(self, index: Index) -> None:
        """Take an index that was built aside, and catch up with what was committed meanwhile."""
        self.index = index
        self._unsaved = 1
        self.catch_up()

    def rebuilt(self) -> Index:
        """Return an index of what is in the database, without removed rows, made aside."""
        aside = IndexFile(self._folder, self._database, self._kind, self.empty)
        aside.catch_up()
        return aside.index

    def changed(self, count: int) -> None:
        """Note that so many rows were added or removed."""
        self._unsaved += count

    def due(self) -> bool:
        """Whether so much has changed that a crash now would cost a long catching up."""
        return self._unsaved > max(_SAVE_AFTER, len(self.index) // 4)

    def save(self) -> None:
        """Write the file, bind it to the database, and remove the one before.

        Raises:
            StoreError: If it cannot be written; the database is as it was.
        """
        path = self._folder / self._kind.new_name()
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            # Written, fsynced, hashed, renamed, and only then named by the database: a crash in between leaves a file that
            # nothing names, and the one before stays valid.
            with explained(path):
                self.index.write(temporary)
                sync_file(temporary)
                digest = sha256(temporary)
                publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        before = [name for name in self._database.index_files() if self._kind.file.fullmatch(name)]
        self._database.bind_index_file(path.name, digest, instead_of=before)
        self._unsaved = 0
        remove_orphans(self._folder, self._database)


def remove_orphans(folder: Path, database: Database) -> None:
    """Remove what a crash left: temporary files, and index files that the database does not name."""
    keep = {*database.index_files(), RECORD_FILE}
    try:
        for path in folder.iterdir():
            name = path.name.removesuffix(TEMPORARY)
            ours = name == RECORD_FILE or any(kind.file.fullmatch(name) for kind in KINDS)
            if ours and path.name not in keep:
                path.unlink(missing_ok=True)
    except OSError as exc:
        # They cost space and nothing else; the next one to open the store tries again.
        _log.warning("A file that is no longer needed could not be removed: %s", exc)


def shown(starts: range, name: str) -> Iterable[int]:
    """Return where parts of many rows start, with a progress bar where there are several parts and a terminal."""
    # Even a silent bar takes a lock that forked processes share, and that is lost with one that is killed meanwhile.
    return tqdm(starts, desc=name, unit_scale=starts.step, disable=None) if starts.stop > _CHUNK else starts
