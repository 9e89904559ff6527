"""An open store: its lock, its database, its indexes in memory, and the commits that keep the three in step."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from qwen_rerank.errors import InvalidInputError, StoreError
from qwen_rerank.protocols import Embedder
from qwen_rerank.sharing import SharedCopies
from qwen_rerank.store.access import Guard, WriterLock
from qwen_rerank.store.commits import Change, Commit, StoreSettings, read_commit_record
from qwen_rerank.store.database import Database
from qwen_rerank.store.errors import StoreFullError, StoreLockedError, StoreReadOnlyError
from qwen_rerank.store.faiss_build import gpu_resources, load_faiss
from qwen_rerank.store.index import VectorIndex
from qwen_rerank.store.index_file import VECTORS, WORDS, IndexFile, remove_orphans, shown
from qwen_rerank.store.opening import (
    StoreStatistics,
    VerifyReport,
    await_seal,
    check_database,
    check_opening,
    copy_store,
    examine,
    match_embedder,
    resolve,
    statistics,
)
from qwen_rerank.store.rows import Row, check_vectors, normalise
from qwen_rerank.store.seal import Seal
from qwen_rerank.types import Document
from qwen_rerank.words import Part, WordIndex, part_of

_log = logging.getLogger(__name__)

_AMONG = f"{VECTORS.condition} AND row IN (SELECT value FROM json_each(?))"
_ROWS_AT_ONCE = 2000  # rows read while no search can run
_INDEX_BEHIND = "the index in memory could not be updated"


class StoreHandle(SharedCopies):
    """An open store's parts, which every call of `FaissStore` needs.

    Attributes:
        path: The store's folder.
        embedder: As given; None searches by words alone.
        read_only: Whether writing is refused.
    """

    def __init__(self, folder: Path, embedder: Embedder | None, *, read_only: bool, device: str) -> None:
        self.path = folder
        self.embedder = embedder
        self.read_only = read_only
        self._device = device
        self._vectors: IndexFile[VectorIndex] | None = None
        self._words: IndexFile[WordIndex] | None = None
        self._filtered: dict[str, np.ndarray] = {}
        self._locked = True  # whether the search that is going on holds a snapshot
        self._guard = Guard(folder, read_only=read_only)
        self._lock = None if read_only else WriterLock(folder)
        try:
            self._database = Database(folder, read_only=read_only, writable=os.access(folder, os.W_OK))
            try:
                self._load()
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            self._unlock()
            raise

    def _load(self) -> None:
        if self.read_only:
            await_seal(self._database, self.path)
        with self._database.snapshot():
            self._settings, self._commit = check_opening(self._database, self.path, keep_pages=not self.read_only)
            match_embedder(self.embedder, self._settings)
            self._load_indexes(self._settings, self._commit)
            self._seen = self._commit.number
        if not self.read_only:
            self._recover()

    def _load_indexes(self, settings: StoreSettings, commit: Commit | None = None) -> None:
        """Load the indexes that settings ask for and that are not there yet; faster where the commit is known."""
        if settings.dim and self._vectors is None:
            faiss = load_faiss()
            gpu = gpu_resources(faiss, self._device)
            vectors = IndexFile(
                self.path,
                self._database,
                VECTORS,
                lambda: VectorIndex(
                    faiss, settings.index, settings.dim, gpu=gpu, effort=self._settings.effort, stored=self._stored
                ),
            )
            vectors.load(None if commit is None else commit.documents - commit.without_vector)
            if self._settings.index == "auto" and not (vectors.found and vectors.index.looks_into):
                vectors.index.effort = 0  # nothing tells whether it was a number of lists or of nodes
            self._vectors = vectors
        if settings.words and self._words is None:
            words = IndexFile(self.path, self._database, WORDS, WordIndex)
            words.load(None if commit is None else commit.documents)
            self._words = words

    @property
    def _index_files(self) -> list[IndexFile[Any]]:
        return [file for file in (self._vectors, self._words) if file is not None]

    @property
    def dim(self) -> int:
        """Length of a vector; 0 where texts are found by words alone."""
        return self._settings.dim

    def _recover(self) -> None:
        # A crash between commit and acknowledgement leaves the record one behind.
        current = self._commit.record(self._settings)
        if read_commit_record(self.path) != current:
            current.acknowledge(self.path, current.prepare(self.path))
        remove_orphans(self.path, self._database)
        if self._vectors is not None and self._settings.effort and not self._vectors.index.effort:
            self._forget_effort(self._vectors.index)
        self._seal()

    def _forget_effort(self, index: VectorIndex) -> None:
        """Let the default be the effort again, durably, where `index` takes the place of one that it was tuned for."""
        _log.warning(
            "The index of %s is of the kind %s now, and effort=%d was tuned for another: its default counts; "
            "tune it again: qwen-rerank store tune %s",
            self.path,
            index.kind,
            self._settings.effort,
            self.path,
        )
        self._change_settings(replace(self._settings, effort=0))
        index.effort = 0

    def _seal(self) -> None:
        """Note what the database file is now, so that the next `open` need not check each row."""
        if (pages := self._database.pages.total()) is not None:
            Seal.of(self._commit, self._settings, pages).write(self.path)

    # Commits

    def _replace(self, documents: Sequence[Document], vectors: np.ndarray, removed: Sequence[Row]) -> None:
        """Store documents with their vectors, float32 `(n_documents, dim)`, in place of rows."""
        if not documents and not removed:
            return
        first = self._commit.next_row
        change = Change.replacing(documents, vectors, removed, first=first, kind=self._settings.vector_kind)
        texts = [document.text for document in documents]
        part = part_of(np.arange(first, first + len(texts)), texts) if self._words is not None and texts else None
        self._write(change, lambda: self._follow(change, vectors[vectors.any(axis=1)], part))
        if any(file.due() for file in self._index_files):
            self._try_to_save()
        self._seal()

    def _follow(self, change: Change, vectors: np.ndarray, part: Part | None) -> None:
        """Take a change into the indexes in memory; searches go on and find all of it or nothing."""
        gone = np.array([row.number for row in change.removed], dtype=np.int64)
        numbers = np.array([number for number, _ in change.vectors], dtype=np.int64)
        for start in range(0, len(numbers), self._vectors.index.step if self._vectors else 1):
            if self._vectors is not None:
                span = slice(start, start + self._vectors.index.step)
                with self._guard.changing():
                    self._vectors.index.add(numbers[span], vectors[span], hidden=True)
        with self._guard.changing():
            if self._vectors is not None:
                self._vectors.index.show()
                self._vectors.changed(len(numbers))
            if self._words is not None and part is not None:
                self._words.index.append(part)
                self._words.changed(len(part.rows))
            for file in self._index_files:
                file.remove(gone)
            self._filtered.clear()

    def _change_settings(self, settings: StoreSettings) -> None:
        """Commit other settings, and load the indexes that they ask for."""
        self._write(Change([], [], []), lambda: self._load_more(settings), settings)
        self._seal()

    def _load_more(self, settings: StoreSettings) -> None:
        with self._database.snapshot():
            self._load_indexes(settings)

    def _write(self, change: Change, follow: Callable[[], None], settings: StoreSettings | None = None) -> None:
        """Make a change durable before the caller hears of it: prepare the record, commit, acknowledge, follow in memory."""
        settings = settings or self._settings
        after = change.apply(self._commit, self._settings)
        record = after.record(settings)
        # 1. The record of the commit to come, durable under a temporary name: whatever may fail for want of space fails
        #    before the commit, and nothing but a rename is left after it.
        prepared = record.prepare(self.path)
        fault: str | None = "a commit was interrupted"
        try:
            # 2. The commit. From here on the change is there after any crash, acknowledged or not.
            try:
                with self._database.transaction():
                    self._database.write(change, after)
                    if settings != self._settings:
                        self._database.change_settings(self._settings, settings)
            except (StoreFullError, StoreLockedError, StoreReadOnlyError, InvalidInputError):
                # Rolled back: disk and handle are as they were.
                fault = None
                raise
            # 3. The acknowledgement, only now: a record that ran ahead of its database would look like a lost commit.
            record.acknowledge(self.path, prepared)
            # 4. What is stored is stored; a handle whose indexes have missed it must not go on.
            self._commit, fault = after, _INDEX_BEHIND
            follow()
            self._settings = settings
        except BaseException:
            self._guard.fault = fault
            raise

    @contextmanager
    def _indexing(self) -> Iterator[None]:
        """Change the indexes in memory; a handle that failed to must not go on."""
        try:
            with self._guard.changing():
                yield
                self._filtered.clear()
        except BaseException:
            self._guard.fault = _INDEX_BEHIND
            raise

    # Reading

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Hold one commit as a whole, with the indexes at just that commit."""
        with self._guard.using(), self._current():
            yield

    @contextmanager
    def _current(self, *, patient: bool = True) -> Iterator[None]:
        with self._database.snapshot(patient=patient):
            if (number := self._database.number()) != self._seen:
                with self._indexing():
                    if self.read_only:
                        before, self._settings = self._settings, self._database.settings()
                        if self._vectors is not None and self._settings.effort != before.effort:
                            # Where "auto" once built lists, the writer may have a graph by now.
                            lists = self._settings.index == "auto" and self._vectors.index.looks_into == "lists"
                            self._vectors.index.effort = 0 if lists else self._settings.effort
                        for file in self._index_files:
                            file.catch_up()
                        self._load_indexes(self._settings)
                self._seen = number
            yield

    # Searching

    def _embedder(self) -> Embedder:
        if self.embedder is None:
            raise InvalidInputError(
                f"{self.path} was opened without an embedder; open it with the one that built it, or give vectors."
            )
        return self.embedder

    def _scaled(self, vectors: np.ndarray) -> np.ndarray:
        return normalise(vectors) if self._settings.metric == "cosine" else vectors

    def _as_stored(self, vectors: np.ndarray) -> np.ndarray:
        """Return scaled vectors, rounded as the database keeps them, float32 `(n, dim)`."""
        with np.errstate(over="ignore"):
            rounded = self._scaled(vectors).astype(self._settings.vector_kind).astype(np.float32)
        return check_vectors(rounded, dim=self._settings.dim)

    def _stored(self, numbers: np.ndarray) -> np.ndarray:
        return self._database.vectors(numbers, locked=self._locked)

    # Upkeep

    def verify(self) -> VerifyReport:
        """Check every byte of the database and compare the indexes with it; nothing is changed."""
        with self._reading():
            vectors = self._vectors.index if self._vectors else None
            words = self._words.index if self._words else None
            return examine(self._database, self.path, vectors, words)

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the store as it is now to a new folder, whole or not at all; the store stays open.

        Raises:
            StoreExistsError: If something is at that path already, other than an empty folder.
        """
        target = resolve(path)
        with self._reading():
            copy_store(self._database, self.path, target)

    def save(self) -> None:
        """Write the index files now. Nothing depends on it but the time that the next `open` takes."""
        with self._guard.using(write=True):
            for file in self._index_files:
                file.save()
            self._seal()

    def compact(self) -> None:
        """Build the indexes again without deleted documents, give their space back, and write the index files.

        Searches of other threads go on meanwhile, but for the moment in which space is given back.
        """
        self.rebuild_index()
        with self._guard.using(write=True):
            if self._words is not None:
                with self._database.snapshot():
                    words = self._words.rebuilt()
                    with self._indexing():
                        self._words.replace(words)
            self._database.shrink()
            for file in self._index_files:
                file.save()
            # Every page is new, so every row is checked before the file gets its seal.
            with self._database.snapshot():
                self._database.pages.read()
                check_database(self._database, self.path)
            self._seal()

    def rebuild_index(self) -> None:
        """Build the index of vectors again, the one that suits as many as there are; searches go on meanwhile."""
        with self._guard.using(write=True):
            if self._vectors is None:
                return
            file, rows = self._vectors, self._database.matching_rows(VECTORS.condition)
        index = file.empty()
        if len(rows):
            index.start(len(rows), lambda count: self._present(spread(rows, count))[1])
        for start in shown(range(0, len(rows), _ROWS_AT_ONCE), "index"):
            index.add(*self._present(rows[start : start + _ROWS_AT_ONCE]))
        with self._guard.using(write=True):
            # Any other factory string has one kind of effort, whatever it is kept as while there are few vectors.
            if self._settings.effort and index.factory == "auto" and index.looks_into != file.index.looks_into:
                self._forget_effort(index)
            with self._database.snapshot(), self._indexing():
                file.replace(index)

    def _present(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return those of these ascending rows that are still there, and their vectors; each call waits for no other."""
        parts = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
        numbers, vectors = [np.empty(0, np.int64)], [np.empty((0, self.dim), np.float32)]
        for part in parts:
            with self._guard.using(write=True), self._database.snapshot():
                there = self._database.matching_rows(_AMONG, [json.dumps(part.tolist())])
                numbers.append(there)
                vectors.append(self._database.vectors(there))
        return np.concatenate(numbers), np.concatenate(vectors)

    def close(self) -> None:
        """Write the index files that are behind, and let the next writer in; closing twice is fine."""
        with self._guard.closing() as first:
            if not first:
                return
            try:
                if not self.read_only and self._guard.fault is None:
                    self._try_to_save()
                    self._seal()
                self._database.close()
            finally:
                self._unlock()

    def _try_to_save(self) -> None:
        try:
            for file in self._index_files:
                if not file.saved:
                    file.save()
        except StoreError as exc:
            _log.warning("An index file was not written; the next open catches up from the database: %s", exc)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Return how many documents there are, those without a vector included."""
        with self._reading():
            return self._database.count()

    @property
    def without_vector(self) -> int:
        """The number of documents without a vector, because their text has no tokens."""
        with self._reading():
            return self._database.count("vector_digest IS NULL")

    def statistics(self) -> StoreStatistics:
        """Return counts, settings and sizes."""
        with self._reading():
            return statistics(self._database, self.path, self._settings)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return so many of these rows, ascending, always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:count])
