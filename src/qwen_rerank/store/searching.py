"""Searching of an open store: by vectors, by words and by both, beside its own commits and those of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from qwen_rerank.checks import check_choice
from qwen_rerank.errors import InvalidInputError, StoreError
from qwen_rerank.fusion import HYBRID_K, fuse_ranks
from qwen_rerank.store.commits import read_commit_record
from qwen_rerank.store.errors import StoreLockedError
from qwen_rerank.store.filter_sql import Sql, compile_filter
from qwen_rerank.store.handle import StoreHandle
from qwen_rerank.store.rows import Row
from qwen_rerank.types import Candidate
from qwen_rerank.words import WordStatistics

MODES = ("hybrid", "dense", "lexical")
# Each half recalls at least this many, so that the first of a short result are those of a long one.
_HYBRID_DEPTH = 200

Hits = tuple[np.ndarray, np.ndarray]  # row numbers, int64, and their scores, float32, best first

_FILTERS_REMEMBERED = 8


class SearchHandle(StoreHandle):
    """An open store that can be searched while it is written."""

    @contextmanager
    def _searching(self) -> Iterator[bool]:
        """Hold the indexes at one commit; gives whether the database is at that commit too, or is being written just now."""
        with self._guard.searching() as at_hand, ExitStack() as stack:
            if at_hand:
                try:
                    stack.enter_context(self._current(patient=not self.read_only))  # no other handle writes
                except StoreLockedError:
                    at_hand = False
            self._locked = at_hand
            try:
                yield at_hand
            finally:
                self._locked = True

    def _allowed(self, condition: Sql) -> np.ndarray:
        """Return for each row number whether it is under a condition; the last few are remembered until the next commit."""
        key = repr(condition)
        if key not in self._filtered:
            while len(self._filtered) >= _FILTERS_REMEMBERED:
                del self._filtered[next(iter(self._filtered))]
            self._filtered[key] = self._database.matching_mask(*condition)
        return self._filtered[key]

    def _mode(self, mode: str | None, *, embeds: bool) -> str:
        """Return the mode of a search that embeds its queries or has their vectors, or say what the store lacks for it."""
        has_vectors, has_words = self._settings.dim > 0, self._settings.words
        if mode is None:
            dense = has_vectors and (not embeds or self.embedder is not None or not has_words)
            return "hybrid" if dense and has_words else "dense" if dense else "lexical"
        check_choice("mode", mode, MODES)
        if mode != "lexical" and not has_vectors:
            raise InvalidInputError(f"mode={mode!r} needs vectors, but {self.path} was made without an embedder.")
        if mode != "dense" and not has_words:
            raise InvalidInputError(
                f"mode={mode!r} needs words, but {self.path} has none yet; call build_words() once."
            )
        return mode

    def _search(
        self,
        texts: Sequence[str],
        vectors: np.ndarray | None,
        top_k: int,
        mode: str,
        filter: Mapping[str, Any] | None,
        weights: Sequence[float] | None = None,
        statistics: WordStatistics | None = None,
    ) -> list[list[Candidate]]:
        """Return the candidates of every query; `vectors` are those of the queries, None for a lexical search.

        `statistics` are those of the queries' words, where this store has only a part of all texts.
        """
        condition = None if filter is None else compile_filter(filter, declared=self._settings.indexed_fields)
        depth = recall_depth(mode, top_k)
        with self._searching() as at_hand:
            found = self._found(texts, vectors, top_k, depth, mode, condition, weights, statistics, at_hand=at_hand)
        if found is None:
            # What it needs is in the writer's hands: a commit that it missed, a new filter, a document that is being replaced.
            with self._guard.using(), self._guard.changing(), self._current():
                found = self._found(texts, vectors, top_k, depth, mode, condition, weights, statistics, at_hand=True)
        hits, rows = found if found is not None else ([], {})
        kind = {"hybrid": "fused", "lexical": "bm25", "dense": self._settings.metric}[mode]
        return [
            [
                Candidate(rows[number].document(), score, rank, kind)
                for rank, (number, score) in enumerate(zip(numbers.tolist(), scores.tolist(), strict=True), start=1)
            ]
            for numbers, scores in hits
        ]

    def _found(
        self,
        texts: Sequence[str],
        vectors: np.ndarray | None,
        top_k: int,
        depth: int,
        mode: str,
        condition: Sql | None,
        weights: Sequence[float] | None,
        statistics: WordStatistics | None,
        *,
        at_hand: bool,
    ) -> tuple[list[Hits], dict[int, Row]] | None:
        """Return the hits of every query and their rows; None if they cannot be told while the database is written."""
        if not at_hand and (self._behind() or (condition is not None and repr(condition) not in self._filtered)):
            return None
        allowed = None if condition is None else self._allowed(condition)
        try:
            dense = [] if vectors is None else self._dense(vectors, depth, allowed)
            lexical = [] if mode == "dense" else self._lexical(texts, depth, allowed, statistics)
            hits = dense or lexical
            if mode == "hybrid":
                hits = [_fused(pair, top_k, weights) for pair in zip(dense, lexical, strict=True)]
            wanted = {int(row) for numbers, _ in hits for row in numbers}
            rows = self._database.rows(wanted, locked=at_hand)
        except StoreError:
            if at_hand:
                raise
            return None
        return (hits, rows) if at_hand or len(rows) == len(wanted) else None

    def _behind(self) -> bool:
        """Return whether a commit was acknowledged that a reader's indexes have missed; a writer's miss none."""
        return self.read_only and read_commit_record(self.path).commit > self._seen

    def _dense(self, vectors: np.ndarray, depth: int, allowed: np.ndarray | None) -> list[Hits]:
        if self._vectors is None:
            return []
        known = np.asarray(vectors.any(axis=1))  # a query without tokens is similar to nothing
        found = iter(self._vectors.index.search(self._scaled(vectors[known]), depth, allowed))
        return [next(found) if one else (np.empty(0, np.int64), np.empty(0, np.float32)) for one in known]

    def _lexical(
        self, texts: Sequence[str], depth: int, allowed: np.ndarray | None, statistics: WordStatistics | None
    ) -> list[Hits]:
        index = None if self._words is None else self._words.index
        return [] if index is None else [index.search(text, depth, allowed, statistics) for text in texts]

    def _prepared(self, texts: Sequence[str], mode: str | None, *, embeds: bool) -> tuple[str, WordStatistics]:
        """Return the mode of a search as `_mode` chooses it, and what this store tells of the queries' words."""
        with self._searching():
            chosen = self._mode(mode, embeds=embeds)
            if chosen == "dense" or self._words is None:
                return chosen, WordStatistics(0, 0, {})
            return chosen, self._words.index.statistics(texts)


def recall_depth(mode: str, top_k: int) -> int:
    """Return how many documents each half of a search recalls."""
    return max(2 * top_k, _HYBRID_DEPTH) if mode == "hybrid" else top_k


def _fused(halves: Sequence[Hits], top_k: int, weights: Sequence[float] | None) -> Hits:
    fused = fuse_ranks([rows.tolist() for rows, _ in halves], k=HYBRID_K, weights=weights)[:top_k]
    return np.array([row for row, _ in fused], dtype=np.int64), np.array([score for _, score in fused])
