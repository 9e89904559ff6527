"""Fusion: one ranking out of several over the same documents."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from qwen_rerank.checks import check_count, check_weights
from qwen_rerank.types import Candidate, Document

DEFAULT_K = 60  # as published
# For one lexical and one dense ranking of one store; fitted on train splits by eval/store/hybrid.py.
HYBRID_K = 1

Key = TypeVar("Key", bound=Hashable)


def fuse_ranks(
    rankings: Sequence[Sequence[Key]], *, k: int = DEFAULT_K, weights: Sequence[float] | None = None
) -> list[tuple[Key, float]]:
    """Return the members of several rankings with their fused scores, best first.

    A member's score is the sum of `weight / (k + rank)` over the rankings that hold it: reciprocal rank fusion (Cormack,
    Clarke and Buettcher 2009, doi:10.1145/1571941.1572114). Equal scores keep the order in which members are first met; a
    ranking with weight 0 is not looked at.
    """
    scores: dict[Key, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, member in enumerate(dict.fromkeys(ranking) if weight else (), start=1):
            scores[member] = scores.get(member, 0.0) + weight / (k + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def rank_fusion(
    candidate_lists: Sequence[Sequence[Candidate]], *, k: int = DEFAULT_K, weights: Sequence[float] | None = None
) -> list[Candidate]:
    """Return one list of candidates from several, by reciprocal rank fusion.

    A list without a document adds nothing to it. Documents are the same when their ids are.

    Args:
        candidate_lists: Candidates, best first; only their places count, not their scores.
        k: Damps the first ranks, at least 1.
        weights: How much each list counts, one positive number a list; None for all alike.

    Returns:
        Candidates with the fused score, which says nothing but the order, and `score_kind="fused"`.
    """
    check_count("k", k)
    checked = None if weights is None else check_weights("weights", weights, count=len(candidate_lists))
    documents: dict[str, Document] = {}
    for candidates in candidate_lists:
        for candidate in candidates:
            documents.setdefault(candidate.document.id, candidate.document)
    rankings = [[candidate.document.id for candidate in candidates] for candidates in candidate_lists]
    fused = fuse_ranks(rankings, k=k, weights=checked)
    return [Candidate(documents[id], score, rank, "fused") for rank, (id, score) in enumerate(fused, start=1)]
