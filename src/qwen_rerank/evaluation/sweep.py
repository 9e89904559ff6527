"""Which first stage, which reranker, how deep? Quality, time and money of every combination, and one recommendation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.cache import ScoreCache
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.evaluation.experiment import Recall, recall, rerank_run, score_run, time_reranking
from qwen_rerank.evaluation.measures import DEFAULT_MEASURES, measure
from qwen_rerank.evaluation.significance import compare
from qwen_rerank.protocols import FirstStage
from qwen_rerank.reranker import Reranker

SECONDS_AN_HOUR = 3600


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting and what it is worth.

    Attributes:
        first_stage: Name.
        reranker: Name, or None for the first stage alone.
        depth: Candidates reranked; 0 for the first stage alone.
        means: Measure to mean over queries.
        per_query: Query id to the primary measure.
        p50_ms: Median milliseconds of one search, both stages, one query at a time.
        p95_ms: 95th percentile of the same.
        cost: Money for 1,000 searches at the given price, or None without one.
    """

    first_stage: str
    reranker: str | None
    depth: int
    means: Mapping[str, float]
    per_query: Mapping[str, float] = field(repr=False)
    p50_ms: float
    p95_ms: float
    cost: float | None

    @property
    def label(self) -> str:
        """The setting in a few words."""
        return self.first_stage if self.reranker is None else f"{self.first_stage} → {self.reranker} @{self.depth}"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The setting to take, and why in one sentence."""

    outcome: Outcome
    sentence: str


def sweep(
    collection: Collection,
    first_stages: Mapping[str, FirstStage],
    rerankers: Mapping[str, Reranker],
    *,
    depths: Sequence[int] = (10, 20, 50, 100),
    primary: str = "nDCG@10",
    measures: Sequence[str] = DEFAULT_MEASURES,
    cache: ScoreCache | None = None,
    n_timed: int = 10,
    price_per_hour: float | None = None,
) -> list[Outcome]:
    """Measure every first stage alone and with every reranker at every depth.

    Scoring is done once a pair of first stage and reranker, to the deepest depth. Times are measured apart from it, on the first
    `n_timed` queries, without the cache and one query at a time.

    Args:
        collection: What is measured on.
        first_stages: Name to first stage.
        rerankers: Name to reranker; one for each model, instruction and long-document strategy to be tried.
        depths: How many candidates are reranked.
        primary: The measure that decides.
        measures: All measures, the primary among them or added.
        cache: Scores on disk; with it a sweep that broke off goes on.
        n_timed: Queries that are timed.
        price_per_hour: Money for an hour of the machine that this runs on; gives the cost of 1,000 searches.
    """
    if not first_stages or not depths:
        raise InvalidInputError("a sweep needs at least one first stage and one depth.")
    names = tuple(dict.fromkeys((primary, *measures)))
    outcomes = []

    def judge(
        name: str, reranker: str | None, depth: int, run: dict[str, list[tuple[str, float]]], seconds: np.ndarray
    ) -> None:
        measured = measure(run, collection.qrels, names)
        outcomes.append(
            _outcome(name, reranker, depth, measured.means, measured.per_query[primary], seconds, price_per_hour)
        )

    for first_name, first_stage in first_stages.items():
        found = recall(first_stage, collection, top_k=max(depths), name=first_name)
        searching = np.array(list(found.seconds.values()))
        judge(first_name, None, 0, found.run, searching)
        for name, reranker in rerankers.items():
            label = f"{first_name} → {name}"
            scores = score_run(reranker, collection, found.run, depth=max(depths), cache=cache, name=label)
            for depth in depths:
                seconds = _both_stages(found, reranker, collection, depth, n_timed)
                judge(first_name, name, depth, rerank_run(found.run, scores, depth=depth), seconds)
    return outcomes


def _both_stages(found: Recall, reranker: Reranker, collection: Collection, depth: int, n_timed: int) -> np.ndarray:
    reranking = time_reranking(reranker, collection, found.run, depth=depth, n_queries=n_timed)
    return np.asarray(list(found.seconds.values())[: len(reranking)] + reranking)


def _outcome(
    first_stage: str,
    reranker: str | None,
    depth: int,
    means: Mapping[str, float],
    per_query: Mapping[str, float],
    seconds: np.ndarray,
    price_per_hour: float | None,
) -> Outcome:
    cost = None if price_per_hour is None else float(np.mean(seconds)) * 1000 / SECONDS_AN_HOUR * price_per_hour
    p50, p95 = (float(value) * 1000 for value in np.percentile(seconds, [50, 95]))
    return Outcome(first_stage, reranker, depth, dict(means), dict(per_query), p50, p95, cost)


def pareto(outcomes: Sequence[Outcome], *, primary: str, price: Callable[[Outcome], float]) -> list[Outcome]:
    """Return the outcomes that no other beats at no higher price, cheapest first.

    Args:
        outcomes: All of them.
        primary: The measure that decides.
        price: What an outcome costs, in milliseconds or money.
    """
    front: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (price(o), -o.means[primary])):
        if not front or outcome.means[primary] > front[-1].means[primary]:
            front.append(outcome)
    return front


def recommend(
    outcomes: Sequence[Outcome],
    *,
    primary: str = "nDCG@10",
    max_p95_ms: float | None = None,
    max_cost: float | None = None,
) -> Recommendation:
    """Return the fastest setting within the budget that is not shown to be worse than the best one within it.

    "Shown" means that the paired 95 % interval of the difference lies below zero.

    Raises:
        InvalidInputError: If nothing keeps the budget, or `max_cost` is given and the costs are not known.
    """
    if max_cost is not None and any(outcome.cost is None for outcome in outcomes):
        raise InvalidInputError("max_cost needs price_per_hour in the sweep, so that costs are known.")
    within = [
        outcome
        for outcome in outcomes
        if (max_p95_ms is None or outcome.p95_ms <= max_p95_ms)
        and (max_cost is None or (outcome.cost is not None and outcome.cost <= max_cost))
    ]
    budget = _budget(max_p95_ms, max_cost)
    if not within:
        fastest = min(outcomes, key=lambda outcome: outcome.p95_ms)
        raise InvalidInputError(
            f"no setting keeps {budget}; the fastest, {fastest.label}, takes {fastest.p95_ms:.0f} ms at p95."
        )
    best = max(within, key=lambda outcome: outcome.means[primary])
    others = {str(i): outcome for i, outcome in enumerate(within) if outcome is not best}
    against = compare(best.per_query, {name: outcome.per_query for name, outcome in others.items()})
    equal = [best, *(others[name] for name, comparison in against.items() if comparison.high >= 0)]
    chosen = min(equal, key=lambda outcome: (outcome.p95_ms, -outcome.means[primary]))
    sentence = (
        f"Within {budget}, take {chosen.label}: {primary} {chosen.means[primary]:.3f} at {chosen.p95_ms:.0f} ms (p95)"
    )
    if chosen is not best:
        sentence += (
            f"; {best.label} reaches {best.means[primary]:.3f}, a difference these queries cannot tell from chance"
        )
    return Recommendation(chosen, sentence + ".")


def _budget(max_p95_ms: float | None, max_cost: float | None) -> str:
    parts = []
    if max_p95_ms is not None:
        parts.append(f"{max_p95_ms:g} ms at p95")
    if max_cost is not None:
        parts.append(f"{max_cost:g} for 1,000 searches")
    return " and ".join(parts) or "no budget"
