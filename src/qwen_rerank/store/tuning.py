"""Tuning of an approximate index: how much of the exact answer each effort finds, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qwen_rerank.store.index import VectorIndex


@dataclass(frozen=True, slots=True)
class TunedEffort:
    """One effort of a search, measured.

    Attributes:
        effort: How many lists (IVF) or nodes (HNSW) a search looks into.
        recall: Share of the exact best documents that it finds, in [0, 1], mean of the queries.
        p50_ms: Median milliseconds of one query, without its embedding.
        p95_ms: 95th percentile.
        recall_low: Lower end of the mean's one-sided 95 % interval, in [0, 1]: what other queries of the kind can be expected
            to find. 0 for a single query, which tells nothing of others.
        chosen: Whether the store keeps it.
    """

    effort: int
    recall: float
    p50_ms: float
    p95_ms: float
    recall_low: float
    chosen: bool = False


def exact_rows(queries: np.ndarray, chunks: Iterable[tuple[np.ndarray, np.ndarray]], top_k: int) -> list[set[int]]:
    """Return the rows of the exact best `top_k` of each query `(n, dim)`, from all `(rows, vectors)` in pieces."""
    scores, best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for rows, vectors in chunks:
        scores = np.hstack([scores, queries @ vectors.T])
        best = np.hstack([best, np.broadcast_to(rows, (len(queries), len(rows)))])
        kept = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        scores, best = np.take_along_axis(scores, kept, 1), np.take_along_axis(best, kept, 1)
    return [set(one.tolist()) for one in best]


def measure_effort(
    index: VectorIndex, queries: np.ndarray, exact: list[set[int]], top_k: int, effort: int
) -> TunedEffort:
    """Return recall and time of an effort, one query at a time."""
    found, times = [], []
    for query, wanted in zip(queries, exact, strict=True):
        start = time.perf_counter()
        [(rows, _)] = index.search(query[None], top_k, effort=effort)
        times.append((time.perf_counter() - start) * 1000)
        found.append(len(wanted.intersection(rows.tolist())) / max(1, len(wanted)))
    p50, p95 = np.quantile(times, [0.5, 0.95])
    recall = float(np.mean(found))
    # Normal approximation.
    low = recall - 1.645 * float(np.std(found, ddof=1)) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return TunedEffort(effort, recall, float(p50), float(p95), max(0.0, low))
