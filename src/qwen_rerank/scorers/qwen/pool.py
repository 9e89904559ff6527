"""Several scorers of the same model behind one, for example one a GPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from qwen_rerank.checks import check_query, check_texts
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import Scorer
from qwen_rerank.threaded import check_pairs
from qwen_rerank.types import Fit

_T = TypeVar("_T")
_Share = tuple[Scorer, list[int]]  # a scorer and the indices of its queries


class ScorerPool:
    """Hands every call to the scorer with least to do; the queries of one call are shared out.

    The scorers stay the caller's: closing them is not the pool's business.

    Args:
        scorers: At least one; all with the same fingerprint, so that it does not matter which one answers.

    Raises:
        InvalidInputError: If there is no scorer, or their scores would differ.
    """

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        if not scorers:
            raise InvalidInputError("scorers is empty; give at least one scorer.")
        fingerprints = sorted({scorer.fingerprint for scorer in scorers})
        if len(fingerprints) > 1:
            raise InvalidInputError(
                f"scorers must all give the same scores, but their fingerprints are {', '.join(fingerprints)}; use one "
                "model, template, instruction, max_length and dtype for all of them."
            )
        self.name = scorers[0].name
        self.fingerprint = fingerprints[0]
        self._scorers = list(scorers)
        self._busy = [0] * len(scorers)  # documents under way
        self._lock = threading.Lock()

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """Return log-odds, float32 `(n_documents,)`, from one of the scorers."""
        with self._borrow(len(check_texts("documents", documents))) as scorer:
            return scorer.score(query, documents, instruction=instruction)

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """As `score`, without blocking the event loop."""
        with self._borrow(len(check_texts("documents", documents))) as scorer:
            return await scorer.ascore(query, documents, instruction=instruction)

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """Return one array as `score` gives for each query; the queries are shared out over the scorers."""

        def work(share: _Share) -> list[np.ndarray]:
            scorer, indices = share
            chosen = _pick(query_list, indices), _pick(document_lists, indices)
            return scorer.score_many(*chosen, instruction=instruction)

        query_list, document_lists = _check(queries, documents)
        with self._shared(query_list, document_lists) as shares, ThreadPoolExecutor(len(self._scorers)) as threads:
            return _join(shares, list(threads.map(work, shares)), len(query_list))

    async def ascore_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """As `score_many`, without blocking the event loop."""
        query_list, document_lists = _check(queries, documents)
        with self._shared(query_list, document_lists) as shares:
            results = await asyncio.gather(
                *(
                    scorer.ascore_many(
                        _pick(query_list, indices), _pick(document_lists, indices), instruction=instruction
                    )
                    for scorer, indices in shares
                )
            )
        return _join(shares, results, len(query_list))

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Return what the first scorer says; they all have the same prompt."""
        return self._scorers[0].fit(query, texts, instruction=instruction)

    @contextmanager
    def _borrow(self, load: int) -> Iterator[Scorer]:
        with self._lock:
            place = min(range(len(self._busy)), key=self._busy.__getitem__)
            self._busy[place] += load
        try:
            yield self._scorers[place]
        finally:
            with self._lock:
                self._busy[place] -= load

    @contextmanager
    def _shared(self, queries: list[str], documents: list[list[str]]) -> Iterator[list[_Share]]:
        """Share the queries out, largest first to the least busy scorer; equal queries stay together."""
        groups: dict[str, list[int]] = {}
        for i, query in enumerate(queries):
            groups.setdefault(query, []).append(i)
        loads = {query: sum(len(documents[i]) for i in indices) for query, indices in groups.items()}
        shares: list[list[int]] = [[] for _ in self._scorers]
        added = [0] * len(self._scorers)
        with self._lock:
            for query in sorted(groups, key=loads.__getitem__, reverse=True):
                place = min(range(len(added)), key=lambda i: self._busy[i] + added[i])
                shares[place] += groups[query]
                added[place] += loads[query]
            self._busy = [busy + more for busy, more in zip(self._busy, added, strict=True)]
        try:
            yield [(scorer, indices) for scorer, indices in zip(self._scorers, shares, strict=True) if indices]
        finally:
            with self._lock:
                self._busy = [busy - more for busy, more in zip(self._busy, added, strict=True)]


def _check(queries: object, documents: object) -> tuple[list[str], list[list[str]]]:
    query_list, document_lists = check_pairs(queries, documents)
    return [check_query(query, name=f"queries[{i}]") for i, query in enumerate(query_list)], document_lists


def _pick(values: Sequence[_T], indices: Sequence[int]) -> list[_T]:
    return [values[i] for i in indices]


def _join(shares: list[_Share], results: list[list[np.ndarray]], n_queries: int) -> list[np.ndarray]:
    """Return the shares' results in the order of the queries."""
    found = {
        i: scores
        for (_, indices), part in zip(shares, results, strict=True)
        for i, scores in zip(indices, part, strict=True)
    }
    return [found[i] for i in range(n_queries)]
