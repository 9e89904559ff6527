"""Queries that the second stage helped and hurt most, with their texts, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_rerank.documents import Run
from qwen_rerank.evaluation.collection import Collection


@dataclass(frozen=True, slots=True)
class Move:
    """One query before and after reranking.

    Attributes:
        query: Its text.
        before: The measure of the first stage.
        after: The measure after reranking.
        top_before: Text of the first stage's first document.
        top_after: Text of the reranker's first document.
        relevant_before: Best rank of a relevant document in the first stage, or None where it has none.
        relevant_after: The same after reranking.
    """

    query: str
    before: float
    after: float
    top_before: str
    top_after: str
    relevant_before: int | None
    relevant_after: int | None


def largest_moves(
    collection: Collection,
    before: tuple[Run, Mapping[str, float]],
    after: tuple[Run, Mapping[str, float]],
    *,
    n: int = 10,
) -> tuple[list[Move], list[Move]]:
    """Return the `n` most helped and the `n` most hurt queries, largest change first.

    Args:
        collection: Texts and judgements.
        before: The first stage's run and its measure for each query.
        after: The reranked run and the same measure.
        n: Queries on either side at most; one that did not change is on neither.
    """
    changes = {query: after[1][query] - before[1][query] for query in collection.queries}
    by_change = sorted(changes, key=lambda query: -changes[query])
    texts = {document.id: document.text for document in collection.documents}

    def moves(queries: Sequence[str]) -> list[Move]:
        return [_move(collection, query, before, after, texts) for query in queries]

    helped = [query for query in by_change if changes[query] > 0][:n]
    hurt = [query for query in reversed(by_change) if changes[query] < 0][:n]
    return moves(helped), moves(hurt)


def _move(
    collection: Collection,
    query: str,
    before: tuple[Run, Mapping[str, float]],
    after: tuple[Run, Mapping[str, float]],
    texts: Mapping[str, str],
) -> Move:
    grades = collection.qrels[query]
    first, second = before[0].get(query, []), after[0].get(query, [])
    return Move(
        collection.queries[query],
        before[1][query],
        after[1][query],
        texts[first[0][0]] if first else "",
        texts[second[0][0]] if second else "",
        _best_rank(first, grades),
        _best_rank(second, grades),
    )


def _best_rank(hits: Sequence[tuple[str, float]], grades: Mapping[str, int]) -> int | None:
    return next((rank for rank, (document, _) in enumerate(hits, start=1) if grades.get(document, 0) > 0), None)
