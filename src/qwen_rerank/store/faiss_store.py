"""FaissStore: documents that can be searched by meaning, safe on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qwen_rerank.checks import check_choice, check_count, check_query
from qwen_rerank.errors import InvalidInputError, StoreError
from qwen_rerank.protocols import Embedder
from qwen_rerank.store.access import Guard, WriterLock
from qwen_rerank.store.commits import Change, DeleteReport, StoreSettings, read_commit_record
from qwen_rerank.store.database import Database
from qwen_rerank.store.errors import DuplicateIdError, StoreFullError, StoreLockedError, StoreReadOnlyError
from qwen_rerank.store.faiss_build import DEVICES, gpu_resources, load_faiss
from qwen_rerank.store.filters import Sql, check_fields, compile_filter
from qwen_rerank.store.folder import (
    VerifyReport,
    check_database,
    check_embedder,
    check_folder,
    examine,
    make_store,
    match_embedder,
    new_settings,
    resolve,
)
from qwen_rerank.store.index import VectorIndex, parse_factory
from qwen_rerank.store.index_file import IndexFile
from qwen_rerank.store.rows import (
    Row,
    check_documents,
    check_ids,
    check_not_zero,
    check_vectors,
    normalise,
    repeated,
)
from qwen_rerank.types import Candidate, Document

_log = logging.getLogger(__name__)

METRICS = ("cosine", "ip")
_FILTERS_REMEMBERED = 8
_INDEX_BEHIND = "the index in memory could not be updated"


class FaissStore:
    """A folder of documents with their vectors: a SQLite database, and a FAISS index over it. A `FirstStage`.

    Made by `create` or `open`. When a call that writes returns, what it wrote is on stable storage; a call that raises
    has written nothing, unless it says that the store must be opened again. One handle may write at a time, any number
    may read, and a handle may be shared by threads but not carried over a fork.

    A text for which the embedder gives a zero row, because it has no tokens, is stored without a vector: `get` returns
    it, `without_vector` counts it, `search` never returns it.
    """

    def __init__(self, folder: Path, embedder: Embedder, *, read_only: bool, device: str) -> None:
        self.path = folder
        self.embedder = embedder
        self.read_only = read_only
        self._guard = Guard(folder, read_only=read_only)
        self._lock = None if read_only else WriterLock(folder)
        try:
            self._database = Database(folder, read_only=read_only, writable=os.access(folder, os.W_OK))
            try:
                self._load(device)
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            self._unlock()
            raise

    def _load(self, device: str) -> None:
        with self._database.snapshot():
            self._settings, self._commit = check_database(self._database, self.path)
            match_embedder(self.embedder, self._settings)
            faiss = load_faiss()
            gpu = gpu_resources(faiss, device)
            self._index_file = IndexFile(
                self.path, self._database, lambda: VectorIndex(faiss, self._settings.index, self._settings.dim, gpu=gpu)
            )
            self._index_file.load()
            self._seen = self._commit.number
            self._filtered: dict[tuple[int, str], np.ndarray] = {}
        if not self.read_only:
            self._recover()

    def _recover(self) -> None:
        # A crash between commit and acknowledgement leaves the record one behind.
        current = self._commit.record(self._settings)
        if read_commit_record(self.path) != current:
            current.acknowledge(self.path, current.prepare(self.path))
        self._index_file.remove_orphans()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        embedder: Embedder,
        *,
        index: str = "auto",
        metric: str = "cosine",
        indexed_fields: Iterable[str] = (),
        device: str = "auto",
    ) -> FaissStore:
        """Make an empty store and return it open for writing; it never opens one that is there.

        Args:
            path: A folder that is not there yet, or is empty. Missing parents are made.
            embedder: Gives the vectors, of documents now and of queries later. Its fingerprint is kept.
            index: "auto" is "Flat": exact, every search reads all vectors. "HNSW32" (4 to 128) is a graph: approximate,
                for collections where Flat is too slow, from some 200,000 documents on.
            metric: "cosine", or "ip" for the inner product of vectors as they are.
            indexed_fields: Metadata fields that get an index, so that a filter on them reads few documents and not all.
            device: "auto" searches on the GPU where FAISS's GPU build works, "cpu" or "cuda" insist.

        Raises:
            StoreExistsError: If something is there already.
            InvalidInputError: If an argument is wrong.
        """
        folder = resolve(path)
        check_embedder(embedder)
        check_choice("device", device, DEVICES)
        settings = new_settings(
            embedder,
            metric=check_choice("metric", metric, METRICS),
            index=parse_factory(index),
            indexed_fields=check_fields(indexed_fields),
        )
        make_store(folder, settings)
        return cls.open(folder, embedder, device=device)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], embedder: Embedder, *, read_only: bool = False, device: str = "auto"
    ) -> FaissStore:
        """Open a store; it never makes one. Every row is checked; a bad FAISS file is built again.

        Args:
            path: The store's folder.
            embedder: The one that built the store.
            read_only: Read beside a writer. Each call sees one commit as a whole, the last one.
            device: As for `create`.

        Raises:
            StoreNotFoundError: If nothing is there.
            NotAStoreError: If something else is.
            FormatTooNewError: If a newer version wrote it.
            CorruptStoreError: If it is damaged or has lost acknowledged commits.
            EmbedderMismatchError: If another embedder built it.
            StoreLockedError: If another handle has it open for writing.
        """
        folder = resolve(path)
        check_embedder(embedder)
        check_choice("device", device, DEVICES)
        check_folder(folder)
        return cls(folder, embedder, read_only=read_only, device=device)

    # Writing

    def add(
        self, documents: Iterable[Document | str], *, vectors: np.ndarray | None = None, errors: str = "strict"
    ) -> list[str]:
        """Store documents, all of them or none, and return their ids.

        Args:
            documents: Documents with ids that are not there yet. A string gets a hash of itself as id.
            vectors: Their vectors `(n_documents, dim)`; None embeds the texts.
            errors: What happens to a lone surrogate in a text: "strict" refuses it, "replace" makes it U+FFFD.

        Raises:
            InvalidTextError: If a text holds a lone surrogate; the message says which.
            DuplicateIdError: If an id is there already or twice in `documents`.
            InvalidEmbeddingError: If a vector is NaN, infinite, or a given one is all zeros.
            DimensionMismatchError: If the vectors have another shape.
            StoreFullError: If no space is left.
        """
        batch = check_documents(documents, errors=errors)
        ids = [document.id for document in batch]
        if twice := repeated(ids):
            raise DuplicateIdError(twice, "twice in documents")
        with self._guard.using(write=True):
            self._check_new(ids)
        rows_of_vectors = self._vectors_of(batch, vectors)
        with self._guard.using(write=True):
            self._check_new(ids)
            self._replace(batch, rows_of_vectors, [])
        return ids

    def upsert(
        self, documents: Iterable[Document | str], *, vectors: np.ndarray | None = None, errors: str = "strict"
    ) -> list[str]:
        """Store documents, all of them or none, in place of those with the same ids, and return their ids.

        Of an id that is twice in `documents` the last one counts. Arguments and errors are those of `add`.
        """
        batch = check_documents(documents, errors=errors)
        with self._guard.using(write=True):
            pass
        rows_of_vectors = self._vectors_of(batch, vectors)
        last = sorted({document.id: place for place, document in enumerate(batch)}.values())
        batch, rows_of_vectors = [batch[place] for place in last], rows_of_vectors[last]
        with self._guard.using(write=True):
            before = self._database.rows_of([document.id for document in batch])
            self._replace(batch, rows_of_vectors, list(before.values()))
        return [document.id for document in batch]

    def delete(self, ids: Iterable[str]) -> DeleteReport:
        """Remove documents and say which ids were not there."""
        wanted = list(dict.fromkeys(check_ids(ids)))
        with self._guard.using(write=True):
            found = self._database.rows_of(wanted)
            self._replace([], np.empty((0, self._settings.dim), np.float32), list(found.values()))
        return DeleteReport(len(found), tuple(one for one in wanted if one not in found))

    def _check_new(self, ids: Sequence[str]) -> None:
        if there := self._database.known(ids, documents=self._commit.documents):
            raise DuplicateIdError(there, "in the store already")

    def _vectors_of(self, documents: Sequence[Document], vectors: np.ndarray | None) -> np.ndarray:
        dim = self._settings.dim
        if vectors is not None:
            checked = check_not_zero(check_vectors(vectors, dim=dim, count=len(documents)))
        elif documents:
            texts = [document.text for document in documents]
            checked = check_vectors(self.embedder.embed_documents(texts), dim=dim, count=len(documents))
        else:
            checked = np.empty((0, dim), np.float32)
        return self._scaled(checked)

    def _scaled(self, vectors: np.ndarray) -> np.ndarray:
        return normalise(vectors) if self._settings.metric == "cosine" else vectors

    def _replace(self, documents: Sequence[Document], vectors: np.ndarray, removed: Sequence[Row]) -> None:
        if not documents and not removed:
            return
        change = Change.replacing(documents, vectors, removed, first=self._commit.next_row)
        self._write(change)
        with self._indexing():
            if removed:
                self._index_file.remove(np.array([row.number for row in removed], dtype=np.int64))
            if change.vectors:
                numbers = np.array([number for number, _ in change.vectors], dtype=np.int64)
                self._index_file.add(numbers, vectors[vectors.any(axis=1)])
        if self._index_file.due():
            self._try_to_save()

    def declare(self, fields: Iterable[str]) -> None:
        """Give metadata fields an index, so that a filter on them reads few documents and not all.

        Args:
            fields: Names; those that have an index already are passed over.
        """
        wanted = check_fields(fields)
        with self._guard.using(write=True):
            names = tuple(dict.fromkeys((*self._settings.indexed_fields, *wanted)))
            if names != self._settings.indexed_fields:
                self._write(Change([], [], []), replace(self._settings, indexed_fields=names))
                self._guard.fault = None

    def _write(self, change: Change, settings: StoreSettings | None = None) -> None:
        """Commit a change, and settings where they change with it; what is in memory is up to the caller."""
        settings = settings or self._settings
        after = change.apply(self._commit, self._settings)
        record = after.record(settings)
        # 1. The record of the commit to come, durable under a temporary name: whatever may fail for want of space fails
        #    before the commit, and nothing but a rename is left after it.
        prepared = record.prepare(self.path)
        self._guard.fault = "a commit was interrupted"
        try:
            # 2. The commit. From here on the change is there after any crash, acknowledged or not.
            with self._database.transaction():
                self._database.write(change, after)
                if settings != self._settings:
                    self._database.change_settings(self._settings, settings)
        except (StoreFullError, StoreLockedError, StoreReadOnlyError, InvalidInputError):
            # Rolled back: disk and handle are as they were.
            self._guard.fault = None
            raise
        # 3. The acknowledgement, only now: a record that ran ahead of its database would look like a lost commit.
        record.acknowledge(self.path, prepared)
        self._commit, self._settings = after, settings
        self._guard.fault = _INDEX_BEHIND  # until the caller has updated it

    @contextmanager
    def _indexing(self) -> Iterator[None]:
        # What is stored is stored; a handle whose index has missed it must not go on.
        self._guard.fault = _INDEX_BEHIND
        yield
        self._guard.fault = None

    # Reading

    def get(self, ids: Iterable[str]) -> list[Document]:
        """Return the documents with these ids, in the order of `ids`; unknown ids are left out."""
        wanted = check_ids(ids)
        with self._reading():
            found = self._database.rows_of(wanted)
            return [found[one].document() for one in wanted if one in found]

    def search(self, query: str, top_k: int = 100, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return the `top_k` documents most similar to the query, best first; equal scores in order of arrival.

        Args:
            query: What to look for. A query without tokens finds nothing.
            top_k: At least 1; more than there are gives all.
            filter: What the metadata of documents must be, such as `{"lang": "en", "year": {"$gte": 2020}}`; the
                module `qwen_rerank.filters` describes the language. It is applied before the search, so that there are
                still `top_k` where as many match.

        Returns:
            Candidates with the similarity as score (the cosine, in [-1, 1] up to rounding) and ranks from 1.
        """
        check_query(query)
        check_count("top_k", top_k)
        with self._guard.using():
            pass
        vector = check_vectors(self.embedder.embed_queries([query]), dim=self._settings.dim, count=1)
        if not vector.any():
            return []
        return self._search(vector, top_k, filter)[0]

    def search_vectors(
        self, vectors: np.ndarray, top_k: int = 100, *, filter: Mapping[str, Any] | None = None
    ) -> list[list[Candidate]]:
        """Return what `search` returns for each of `(n_queries, dim)` query vectors.

        Raises:
            DimensionMismatchError: If the vectors have another shape.
            InvalidEmbeddingError: If one is NaN, infinite or all zeros.
        """
        check_count("top_k", top_k)
        return self._search(check_not_zero(check_vectors(vectors, dim=self._settings.dim)), top_k, filter)

    def _search(self, vectors: np.ndarray, top_k: int, filter: Mapping[str, Any] | None) -> list[list[Candidate]]:
        condition = None if filter is None else compile_filter(filter, declared=self._settings.indexed_fields)
        with self._reading():
            allowed = None if condition is None else self._allowed(condition)
            hits = self._index_file.index.search(self._scaled(vectors), top_k, allowed)
            rows = self._database.rows({int(row) for numbers, _ in hits for row in numbers})
        return [
            [
                Candidate(rows[number].document(), score, rank)
                for rank, (number, score) in enumerate(zip(numbers.tolist(), scores.tolist(), strict=True), start=1)
            ]
            for numbers, scores in hits
        ]

    def _allowed(self, condition: Sql) -> np.ndarray:
        """Return the rows under a condition; those of the last few conditions are remembered until the next commit."""
        key = (self._seen, repr(condition))
        if key not in self._filtered:
            while len(self._filtered) >= _FILTERS_REMEMBERED:
                del self._filtered[next(iter(self._filtered))]
            self._filtered[key] = self._database.matching_rows(*condition)
        return self._filtered[key]

    def __len__(self) -> int:
        """Return how many documents there are, those without a vector included."""
        with self._reading():
            return self._database.count()

    @property
    def without_vector(self) -> int:
        """How many documents have no vector, because their text has no tokens."""
        with self._reading():
            return self._database.count("vector_digest IS NULL")

    # Upkeep

    def verify(self) -> VerifyReport:
        """Check every byte of the database and compare the index with it; nothing is changed."""
        with self._reading():
            return examine(self._database, self.path, self._index_file.index)

    def save(self) -> None:
        """Write the FAISS file now. Nothing depends on it but the time that the next `open` takes."""
        with self._guard.using(write=True):
            self._index_file.save()

    def compact(self) -> None:
        """Build the index again without deleted documents, give their space back, and write the FAISS file."""
        with self._guard.using(write=True):
            with self._database.snapshot(), self._indexing():
                self._index_file.rebuild()
            self._database.shrink()
            self._index_file.save()

    def close(self) -> None:
        """Write the FAISS file if it is behind, and let the next writer in; closing twice is fine."""
        with self._guard.closing() as first:
            if not first:
                return
            try:
                if not self.read_only and self._guard.fault is None and not self._index_file.saved:
                    self._try_to_save()
                self._database.close()
            finally:
                self._unlock()

    def _try_to_save(self) -> None:
        try:
            self._index_file.save()
        except StoreError as exc:
            _log.warning("The FAISS file was not written; the next open catches up from the database: %s", exc)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> FaissStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Hold one commit as a whole, with the index at just that commit."""
        with self._guard.using(), self._database.snapshot():
            if (number := self._database.number()) != self._seen:
                if self.read_only:
                    with self._indexing():
                        self._settings = self._database.settings()
                        self._index_file.catch_up()
                self._seen = number
                self._filtered.clear()
            yield
