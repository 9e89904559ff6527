"""FaissStore: documents that can be searched by meaning and by words, filtered, and never lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen_rerank.checks import check_choice, check_count, check_probability, check_query, check_texts, check_weights
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.filters import count_tests, parse_filter
from qwen_rerank.protocols import Embedder
from qwen_rerank.sharing import made_from
from qwen_rerank.store.commits import DeleteReport
from qwen_rerank.store.creation import check_options, new_settings
from qwen_rerank.store.errors import DuplicateIdError
from qwen_rerank.store.faiss_build import DEVICES
from qwen_rerank.store.filter_sql import check_fields, compile_filter
from qwen_rerank.store.handle import spread
from qwen_rerank.store.index_file import VECTORS
from qwen_rerank.store.opening import (
    check_embedder,
    check_folder,
    holds_nothing,
    make_store,
    remove_store,
    resolve,
)
from qwen_rerank.store.rows import check_documents, check_ids, check_not_zero, check_vectors, repeated
from qwen_rerank.store.searching import SearchHandle
from qwen_rerank.store.tuning import TunedEffort, exact_rows, measure_effort
from qwen_rerank.types import Candidate, Document


class FaissStore(SearchHandle):
    """A folder of documents: a SQLite database, with a FAISS index over vectors and an index of words beside it.

    Made by `create`, `open` or `open_or_create`. A `FirstStage`. When a call that writes returns, what it wrote is on
    stable storage; a call that raises has written nothing, unless it says that the store must be opened again. One
    handle may write at a time, any number may read, and a handle may be shared by threads but not carried over a fork.

    A text for which the embedder gives a zero row, because it has no tokens, is stored without a vector: `get` returns
    it, `without_vector` counts it, a dense search never returns it.
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        embedder: Embedder | None,
        *,
        index: str = "auto",
        metric: str = "cosine",
        words: bool = True,
        vectors: str = "float32",
        indexed_fields: Iterable[str] = (),
        device: str = "auto",
    ) -> FaissStore:
        """Make an empty store and return it open for writing; it never opens one that is there.

        Args:
            path: A folder that is not there yet, or is empty. Missing parents are made.
            embedder: Gives the vectors, of documents now and of queries later. Its fingerprint is kept. None makes a
                store that is searched by words alone.
            index: "auto" chooses by size: up to 100,000 vectors "Flat", exact, every search reads all of them; above,
                "HNSW32,SQ8,RFlat", a graph of vectors in 8 bits a number, whose best are ranked by the whole vectors,
                all in memory. Or a FAISS factory string: "HNSW32" (4 to 128) is a graph of whole vectors;
                "IVF1024,SQ8" are lists, built sooner, in a sixth of the memory: its best are ranked by the vectors in
                the database, and a search is shared out among cores, of which a graph's needs one. eval/store/README.md
                says what was measured.
            metric: "cosine", or "ip" for the inner product of vectors as they are.
            words: Whether texts are found by their words too.
            vectors: "float32", or "float16" for half the space and scores that differ in the fourth digit.
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
            embedder, metric=metric, index=index, words=words, vectors=vectors, indexed_fields=indexed_fields
        )
        existed = folder.exists()
        make_store(folder, settings)
        try:
            return cls.open(folder, embedder, device=device)
        except BaseException:
            # Such as a disk that is full by now: the next `create` must not find a store that nobody was given.
            remove_store(folder, keep_folder=existed)
            raise

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], embedder: Embedder | None, *, read_only: bool = False, device: str = "auto"
    ) -> FaissStore:
        """Open a store; it never makes one. A bad index file is built again.

        Every byte of the files is compared with its digest; where that of the database does not fit, as after a crash,
        every row is checked instead, which takes some ten times as long.

        Args:
            path: The store's folder.
            embedder: The one that built the store; None to do without: searches are by words, vectors must be given.
            read_only: Read beside a writer. Each call sees one commit as a whole, the last one. What was added since the
                call before is taken into the indexes first; into a graph that is slow, vector by vector, and after a
                large addition opening anew is sooner once the writer has saved or closed.
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

    @classmethod
    def open_or_create(
        cls, path: str | os.PathLike[str], embedder: Embedder | None, *, device: str = "auto", **options: Any
    ) -> FaissStore:
        """Return the store at `path` open for writing; made first, with the `options` of `create`, if nothing is there.

        Raises:
            InvalidInputError: If there is no such option, or the store that is there was made with another value.
        """
        check_options(path, options)
        if holds_nothing(resolve(path)):
            return cls.create(path, embedder, device=device, **options)
        return cls.open(path, embedder, device=device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle path and embedder of a reader, which is opened again where they arrive.

        Raises:
            InvalidInputError: If this is the one handle that writes.
        """
        if not self.read_only:
            raise InvalidInputError(
                f"the handle that writes to {self.path} cannot be pickled, as there is one at a time; open the store with "
                "read_only=True, or pass its path and open it there."
            )
        settings = {"path": str(self.path), "embedder": self.embedder, "read_only": True, "device": self._device}
        return made_from, (FaissStore.open, settings)

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
        self._outgrow()
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
        self._outgrow()
        return [document.id for document in batch]

    def update_metadata(self, changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Change metadata of documents without embedding them again, all of them or none; return the ids not there.

        Args:
            changes: For each id the values to set; other values stay as they are.
        """
        if not isinstance(changes, Mapping) or not all(isinstance(one, Mapping) for one in changes.values()):
            raise InvalidInputError("changes must be a mapping like {'id': {'lang': 'en'}}, from ids to new values.")
        ids = check_ids(changes)
        with self._guard.using(write=True):
            before = self._database.rows_of(ids)
            changed = [
                replace(document, metadata={**document.metadata, **changes[document.id]})
                for document in (row.document() for row in before.values())
            ]
            kept = np.zeros((len(before), self._settings.dim), np.float32)
            numbers = np.array([row.number for row in before.values()], dtype=np.int64)
            has_vector = np.array([row.vector_digest is not None for row in before.values()], dtype=bool)
            if has_vector.any():
                order = np.argsort(numbers[has_vector])
                kept[np.flatnonzero(has_vector)[order]] = self._database.vectors(numbers[has_vector][order])
            self._replace(changed, kept, list(before.values()))
        return [one for one in ids if one not in before]

    def delete(self, ids: Iterable[str] | None = None, *, filter: Mapping[str, Any] | None = None) -> DeleteReport:
        """Remove the documents with these ids, or those that a filter keeps; say which ids were not there.

        Args:
            ids: Which documents; or None, with a filter.
            filter: As for `search`, with at least one condition.
        """
        if (ids is None) == (filter is None) or (filter is not None and not count_tests(parse_filter(filter))):
            raise InvalidInputError(f"delete needs ids or a filter with a condition, not {ids=!r}, {filter=!r}.")
        condition = None if filter is None else compile_filter(filter, declared=self._settings.indexed_fields)
        wanted = [] if ids is None else list(dict.fromkeys(check_ids(ids)))
        with self._guard.using(write=True):
            rows = self._database.rows_of(wanted)
            if condition is not None:
                numbers = self._database.matching_rows(*condition)
                rows = {row.id.decode(): row for row in self._database.rows(numbers).values()}
            self._replace([], np.empty((0, self._settings.dim), np.float32), list(rows.values()))
        return DeleteReport(len(rows), tuple(one for one in wanted if one not in rows))

    def declare(self, fields: Iterable[str]) -> None:
        """Give metadata fields an index, so that a filter on them reads few documents and not all.

        Args:
            fields: Names; those that have an index already are passed over.
        """
        wanted = check_fields(fields)
        with self._guard.using(write=True):
            names = tuple(dict.fromkeys((*self._settings.indexed_fields, *wanted)))
            if names != self._settings.indexed_fields:
                self._change_settings(replace(self._settings, indexed_fields=names))

    def build_words(self) -> None:
        """Make texts found by their words too, in a store that was made without."""
        with self._guard.using(write=True):
            if not self._settings.words:
                self._change_settings(replace(self._settings, words=True))

    def _outgrow(self) -> None:
        if self._vectors is not None and self._vectors.index.outgrown:
            self.rebuild_index()

    def _check_new(self, ids: Sequence[str]) -> None:
        if there := self._database.known(ids, documents=self._commit.documents):
            raise DuplicateIdError(there, "in the store already")

    def _vectors_of(self, documents: Sequence[Document], vectors: np.ndarray | None) -> np.ndarray:
        dim = self._settings.dim
        if vectors is not None:
            checked = check_not_zero(check_vectors(vectors, dim=dim, count=len(documents)))
        elif documents and dim:
            texts = [document.text for document in documents]
            checked = check_vectors(self._embedder().embed_documents(texts), dim=dim, count=len(documents))
        else:
            checked = np.empty((len(documents), dim), np.float32)
        return self._as_stored(checked)

    # Reading

    def get(self, ids: Iterable[str]) -> list[Document]:
        """Return the documents with these ids, in the order of `ids`; unknown ids are left out."""
        wanted = check_ids(ids)
        with self._reading():
            found = self._database.rows_of(wanted)
            return [found[one].document() for one in wanted if one in found]

    def __iter__(self) -> Iterator[Document]:
        """Yield every document, in order of arrival; what is written meanwhile may be among them or not."""
        last = 0
        while True:
            with self._reading():
                rows = self._database.rows_after(last)
            if not rows:
                return
            yield from (row.document() for row in rows)
            last = rows[-1].number

    def search(
        self,
        query: str,
        top_k: int = 100,
        *,
        mode: str | None = None,
        filter: Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
    ) -> list[Candidate]:
        """Return the `top_k` documents that fit the query best, best first; equal scores in order of arrival.

        Args:
            query: What to look for. A query without tokens finds nothing.
            top_k: At least 1; more than there are gives all.
            mode: "dense" compares vectors, "lexical" ranks by common words (BM25), "hybrid" fuses both by reciprocal
                rank. None is "hybrid" where the store has both, else the one that it has.
            filter: What the metadata of documents must be, such as `{"lang": "en", "year": {"$gte": 2020}}`; the
                module `qwen_rerank.filters` describes the language. It is applied before the search, so that there are
                still `top_k` where as many match.
            weights: How much the dense and the lexical half of a hybrid search count; None for both alike.

        Returns:
            Candidates with ranks from 1. `score_kind` says what the score is: "cosine" in [-1, 1] up to rounding, "ip",
            "bm25", or "fused", which says nothing but the order.
        """
        check_query(query)
        return self.search_many([query], top_k, mode=mode, filter=filter, weights=weights)[0]

    def search_many(
        self,
        queries: Sequence[str],
        top_k: int = 100,
        *,
        mode: str | None = None,
        filter: Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        vectors: np.ndarray | None = None,
    ) -> list[list[Candidate]]:
        """Return what `search` returns for each query, all of one commit; the queries are embedded together.

        Args:
            queries: What to look for.
            top_k: As for `search`.
            mode: As for `search`.
            filter: As for `search`.
            weights: As for `search`.
            vectors: Vectors of the queries `(n_queries, dim)`; None embeds them.
        """
        texts = [check_query(text, name=f"queries[{i}]") for i, text in enumerate(check_texts("queries", queries))]
        check_count("top_k", top_k)
        checked = None if weights is None else check_weights("weights", weights, count=2)
        with self._searching():
            chosen = self._mode(mode, embeds=vectors is None)
        if not texts or chosen == "lexical":
            return self._search(texts, None, top_k, chosen, filter) if texts else []
        found = self._embedder().embed_queries(texts) if vectors is None else vectors
        asked = check_vectors(found, dim=self._settings.dim, count=len(texts))
        return self._search(texts, asked, top_k, chosen, filter, checked)

    def search_vectors(
        self, vectors: np.ndarray, top_k: int = 100, *, filter: Mapping[str, Any] | None = None
    ) -> list[list[Candidate]]:
        """Return what a dense `search` returns for each of `(n_queries, dim)` query vectors.

        Raises:
            DimensionMismatchError: If the vectors have another shape.
            InvalidEmbeddingError: If one is NaN, infinite or all zeros.
        """
        check_count("top_k", top_k)
        with self._searching():
            self._mode("dense", embeds=False)
        checked = check_not_zero(check_vectors(vectors, dim=self._settings.dim))
        return self._search([""] * len(checked), checked, top_k, "dense", filter)

    def ids(self, *, filter: Mapping[str, Any] | None = None) -> list[str]:
        """Return the ids of all documents, or of those that a filter keeps, in order of arrival."""
        condition = ("1", []) if filter is None else compile_filter(filter, declared=self._settings.indexed_fields)
        with self._reading():
            return self._database.ids(*condition)

    def vectors_of(self, ids: Iterable[str]) -> np.ndarray:
        """Return the stored vectors of documents, float32 `(n_ids, dim)`; zeros where there is none."""
        wanted = check_ids(ids)
        with self._reading():
            rows = self._database.rows_of(wanted)
            numbers = {name: row.number for name, row in rows.items() if row.vector_digest is not None}
            ascending = np.array(sorted(numbers.values()), dtype=np.int64)
            stored = self._database.vectors(ascending)
        out = np.zeros((len(wanted), self._settings.dim), np.float32)
        for place, name in enumerate(wanted):
            if name in numbers:
                out[place] = stored[np.searchsorted(ascending, numbers[name])]
        return out

    def tune(
        self, queries: Sequence[str] | None = None, *, target: float = 0.95, top_k: int = 100
    ) -> list[TunedEffort]:
        """Measure how much of the exact answer an approximate index finds at each effort, and keep the first that does.

        An effort does where other such queries can be expected to reach the target, too: its `recall_low` does. More
        queries spend less on that; a single one proves nothing. Where no effort does, the last and largest is kept.

        Args:
            queries: What will be asked, the more alike the better; None takes 200 of the documents' own vectors.
            target: Recall to reach, in [0, 1].
            top_k: Depth at which recall is measured.

        Returns:
            One entry for each effort that was tried, up to the one that is kept; none for an exact index.
        """
        check_probability("target", target)
        check_count("top_k", top_k)
        with self._guard.using(write=True):
            self._mode("dense", embeds=False)
            rows = self._database.matching_rows(VECTORS.condition)
            file, index = self._vectors, None if self._vectors is None else self._vectors.index
        if file is None or index is None or not index.looks_into or not len(rows):
            return []
        if queries is None:
            asked = self._present(spread(rows, 200))[1]
        else:
            found = self._embedder().embed_queries(check_texts("queries", queries))
            asked = self._scaled(check_vectors(found, dim=self.dim))
        pieces = (self._present(rows[start : start + 20_000]) for start in range(0, len(rows), 20_000))
        exact = exact_rows(asked, pieces, top_k)
        tried: list[TunedEffort] = []
        for effort in index.efforts(top_k):
            with self._guard.using(write=True), self._database.snapshot():
                tried.append(measure_effort(index, asked, exact, top_k, effort))
            if tried[-1].recall_low >= target:
                break
        with self._guard.using(write=True):
            # Another thread may have had the index built anew meanwhile, as another kind, which this tells nothing of.
            if file.index.looks_into == index.looks_into:
                self._change_settings(replace(self._settings, effort=tried[-1].effort))
                file.index.effort = tried[-1].effort
                tried[-1] = replace(tried[-1], chosen=True)
        return tried
