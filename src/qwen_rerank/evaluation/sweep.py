"""Quality, time and cost of every combination of first stage, reranker and depth, and which of them to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_rerank.documents import Run
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.cache import ScoreCache
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run, time_searches
from qwen_rerank.evaluation.measures import DEFAULT_MEASURES, check_measures, measure
from qwen_rerank.evaluation.significance import mean_interval
from qwen_rerank.pipeline import TwoStageRetriever
from qwen_rerank.protocols import FirstStage
from qwen_rerank.reranker import Reranker

SECONDS_AN_HOUR = 3600
FEW_TIMED = 40  # below it at most two searches are slower than the 95th percentile


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting of a sweep with its measures, times and cost.

    Attributes:
        first_stage: Name.
        reranker: Name, or None for the first stage alone.
        depth: Candidates reranked; 0 for the first stage alone.
        means: Measure to mean over queries.
        per_query: Query id to the primary measure.
        p50_ms: Median milliseconds of one search, both stages, one query at a time.
        p95_ms: 95th percentile of the same.
        cost: Money for 1,000 searches at the given prices, or None without any.
        n_timed: Searches that the times come from; None where nobody counted.
    """

    first_stage: str
    reranker: str | None
    depth: int
    means: Mapping[str, float]
    per_query: Mapping[str, float] = field(repr=False)
    p50_ms: float
    p95_ms: float
    cost: float | None
    n_timed: int | None = None

    @property
    def label(self) -> str:
        """The setting in a few words."""
        return self.first_stage if self.reranker is None else f"{self.first_stage} → {self.reranker} @{self.depth}"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The setting to take (None where nothing keeps the budget), and why in one sentence."""

    outcome: Outcome | None
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
    fees: Mapping[str, float] | None = None,
) -> list[Outcome]:
    """Measure every first stage alone and with every reranker at every depth.

    Scoring is done once a pair of first stage and reranker, to the deepest depth. Times are measured apart from it, on the first
    `n_timed` queries, without the cache and one query at a time.

    A search costs the seconds that it takes at `price_per_hour`, and the fee of its reranker.

    Args:
        collection: What is measured on.
        first_stages: Name to first stage.
        rerankers: Name to reranker; one for each model, instruction and long-document strategy to be tried.
        depths: How many candidates are reranked.
        primary: The measure that decides.
        measures: All measures, the primary among them or added.
        cache: Scores on disk; with it a sweep that broke off goes on.
        n_timed: Queries that are timed.
        price_per_hour: Money for an hour of the machine that this runs on.
        fees: Reranker name to what its provider takes for 1,000 searches, for hosted APIs.

    Raises:
        InvalidInputError: If there is nothing to sweep, or a fee names no reranker.
    """
    if not first_stages or not depths:
        raise InvalidInputError("a sweep needs at least one first stage and one depth.")
    if unknown := sorted(set(fees or {}) - set(rerankers)):
        raise InvalidInputError(f"fees names {', '.join(unknown)}; the rerankers are {', '.join(rerankers)}.")
    names = tuple(dict.fromkeys((primary, *measures)))
    deepest = check_measures(names)  # what a measure reads of a first stage, however little of it is reranked
    prices = _Prices(price_per_hour, fees)
    outcomes = []

    def judge(name: str, reranker: str | None, depth: int, run: Run, seconds: np.ndarray) -> None:
        measured = measure(run, collection.qrels, names)
        p50, p95 = (float(value) * 1000 for value in np.percentile(seconds, [50, 95]))
        cost = prices.of(reranker, float(np.mean(seconds)))
        outcomes.append(
            Outcome(
                name, reranker, depth, measured.means, dict(measured.per_query[primary]), p50, p95, cost, len(seconds)
            )
        )

    for first_name, first_stage in first_stages.items():
        found = recall(first_stage, collection, top_k=max(*depths, deepest), name=first_name)
        judge(first_name, None, 0, found.run, np.array(list(found.seconds.values())))
        for name, reranker in rerankers.items():
            label = f"{first_name} → {name}"
            scores = score_run(reranker, collection, found.run, depth=max(depths), cache=cache, name=label)
            for depth in depths:
                retriever = TwoStageRetriever(first_stage, reranker, top_k=depth, top_n=depth)
                seconds = time_searches(retriever, collection, n_queries=n_timed, name=f"time {label} @{depth}")
                judge(first_name, name, depth, rerank_run(found.run, scores, depth=depth), seconds)
    return outcomes


@dataclass(frozen=True, slots=True)
class _Prices:
    """Prices of an hour of the machine and of 1,000 searches of a hosted reranker."""

    per_hour: float | None
    fees: Mapping[str, float] | None

    def of(self, reranker: str | None, seconds: float) -> float | None:
        """Return the cost of 1,000 searches of so many seconds, or None where no price is known."""
        if self.per_hour is None and self.fees is None:
            return None
        fee = (self.fees or {}).get(reranker, 0.0) if reranker is not None else 0.0
        return fee + seconds * 1000 / SECONDS_AN_HOUR * (self.per_hour or 0.0)


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
    tolerance: float = 0.01,
) -> Recommendation:
    """Return the cheapest setting within the budget that is shown to lose no more than `tolerance` against the best one.

    "Shown" means that the paired 95 % interval of the difference ends above `-tolerance`; the intervals are corrected for their number
    (Bonferroni), as the more settings are tried, the sooner one passes by chance. A setting that these queries merely cannot tell from the
    best one is named in the sentence and not taken: few queries cannot tell anything apart.

    Args:
        outcomes: What `sweep` measured.
        primary: The measure that decides.
        max_p95_ms: Budget in milliseconds of one search at the 95th percentile.
        max_cost: Budget in money for 1,000 searches. Where it is the only one, "cheapest" means money, else time.
        tolerance: Loss of the measure that does not matter.

    Raises:
        InvalidInputError: If nothing keeps the budget, or `max_cost` is given and the costs are not known.
    """
    if max_cost is not None and any(outcome.cost is None for outcome in outcomes):
        raise InvalidInputError("max_cost needs a price; give price_per_hour or fees to the sweep.")
    within = [outcome for outcome in outcomes if _keeps(outcome, max_p95_ms, max_cost)]
    budget = _budget(max_p95_ms, max_cost)
    if not within:
        fastest = min(outcomes, key=lambda outcome: outcome.p95_ms)
        raise InvalidInputError(
            f"no setting keeps {budget}; the fastest, {fastest.label}, takes {fastest.p95_ms:.0f} ms at p95."
        )

    def price(outcome: Outcome) -> float:
        return outcome.cost or 0.0 if max_cost is not None and max_p95_ms is None else outcome.p95_ms

    best = max(within, key=lambda outcome: (outcome.means[primary], -price(outcome)))
    confidence = 1 - 0.05 / max(1, len(within) - 1)
    intervals = {outcome.label: _against(outcome, best, confidence) for outcome in within}
    chosen = min(
        (o for o in within if intervals[o.label][0] >= -tolerance), key=lambda o: (price(o), -o.means[primary])
    )
    unclear = [o for o in within if intervals[o.label][1] >= 0 and price(o) < price(chosen)]
    sentence = f"Within {budget}, take {_named(chosen, primary)}"
    if chosen is best:
        sentence += f", the best of {len(within)} settings"
    else:
        sentence += f"; {_named(best, primary)} is better by no more than {tolerance:g} (95 % sure, {len(within)} settings compared)"
    if unclear:
        sentence += f"; these {len(best.per_query)} queries are too few to tell {_named(min(unclear, key=price), primary)} from the best"
    if chosen.n_timed is not None and chosen.n_timed < FEW_TIMED:
        sentence += f"; its p95 is that of {chosen.n_timed} timed searches, about the slowest of them: time more with --timed {FEW_TIMED}"
    return Recommendation(chosen, sentence + ".")


def _keeps(outcome: Outcome, max_p95_ms: float | None, max_cost: float | None) -> bool:
    fast = max_p95_ms is None or outcome.p95_ms <= max_p95_ms
    return fast and (max_cost is None or (outcome.cost is not None and outcome.cost <= max_cost))


def _against(outcome: Outcome, best: Outcome, confidence: float) -> tuple[float, float]:
    """Return the interval of the outcome's mean difference to the best one."""
    differences = [value - best.per_query[query] for query, value in outcome.per_query.items()]
    return mean_interval(np.array(differences), confidence=confidence)


def money(cost: float) -> str:
    """Return a cost with four digits after the point; a smaller one is not shown as nothing."""
    return "< 0.0001" if 0 < cost < 0.0001 else f"{cost:.4f}"


def _named(outcome: Outcome, primary: str) -> str:
    cost = "" if outcome.cost is None else f", {money(outcome.cost)} for 1,000 searches"
    digits = 0 if outcome.p95_ms >= 10 else 1
    return f"{outcome.label} ({primary} {outcome.means[primary]:.3f}, {outcome.p95_ms:.{digits}f} ms at p95{cost})"


def _budget(max_p95_ms: float | None, max_cost: float | None) -> str:
    parts = []
    if max_p95_ms is not None:
        parts.append(f"{max_p95_ms:g} ms at p95")
    if max_cost is not None:
        parts.append(f"{max_cost:g} for 1,000 searches")
    return " and ".join(parts) or "any budget"
