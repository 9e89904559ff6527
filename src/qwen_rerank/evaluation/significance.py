"""Paired tests of runs over their queries, with an interval and a correction for several systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_rerank.errors import InvalidInputError, MissingExtraError

try:
    from scipy import stats
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.evaluation", package="scipy", extra="eval", cause=exc) from exc

_BATCH = 1000  # resamples at once: some megabytes for thousands of queries


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference between a system and a baseline on the same queries.

    Attributes:
        difference: Mean of system minus baseline.
        low: Lower end of the 95 % interval of that mean (BCa bootstrap over queries).
        high: Upper end.
        p_value: Two-sided paired randomisation test: how often signs drawn at random give so large a difference.
        p_corrected: The same after Holm's correction for all comparisons made together.
        wins: Queries where the system is better.
        losses: Queries where it is worse.
        ties: Queries where both are equal.
    """

    difference: float
    low: float
    high: float
    p_value: float
    p_corrected: float
    wins: int
    losses: int
    ties: int


def compare(
    baseline: Mapping[str, float],
    systems: Mapping[str, Mapping[str, float]],
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Compare systems with a baseline, query by query.

    The test is Fisher's paired randomisation test (Smucker, Allan and Carterette 2007, doi:10.1145/1321440.1321528); the
    interval is the bias-corrected and accelerated bootstrap (Efron 1987, doi:10.1080/01621459.1987.10478410); the correction
    is Holm's (1979).

    Args:
        baseline: Query id to value of one measure.
        systems: Name to the same queries' values.
        n_resamples: Random draws of the test and of the bootstrap.
        seed: Of both.

    Raises:
        InvalidInputError: If there are fewer than two queries, or a system was measured on others.
    """
    queries = sorted(baseline)
    if len(queries) < 2:
        raise InvalidInputError(f"a comparison needs at least two queries, not {len(queries)}.")
    base = np.array([baseline[query] for query in queries])
    differences = {}
    for name, values in systems.items():
        if set(values) != set(baseline):
            raise InvalidInputError(
                f"{name!r} was measured on other queries than the baseline; measure both on the same qrels."
            )
        differences[name] = np.array([values[query] for query in queries]) - base
    p_values = [_randomisation(delta, n_resamples, seed) for delta in differences.values()]
    corrected = holm(p_values)
    return {
        name: _summary(delta, p_value, p_corrected, n_resamples, seed)
        for (name, delta), p_value, p_corrected in zip(differences.items(), p_values, corrected, strict=True)
    }


def mean_interval(
    differences: np.ndarray, *, n_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the BCa bootstrap interval of the mean of `(n_queries,)` values, 95 % unless told otherwise."""
    if np.allclose(differences, differences[0], rtol=0, atol=1e-12):  # nothing varies, so nothing can be resampled
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=n_resamples,
        confidence_level=confidence,
        vectorized=True,
        rng=np.random.default_rng(seed),
        batch=_BATCH,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction, in the order given."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for step, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[place]))
        corrected[place] = largest
    return corrected


def _randomisation(differences: np.ndarray, n_resamples: int, seed: int) -> float:
    """Return the share of sign patterns whose mean is as far from zero: of all where they are few, else of random ones."""
    changed = differences[differences != 0]  # a sign on zero changes nothing
    if len(changed) < 2:  # both signs of one difference are as far from zero, and SciPy wants two
        return 1.0
    result = stats.permutation_test(
        (changed,),
        _distance,
        permutation_type="samples",
        alternative="greater",
        n_resamples=n_resamples,
        batch=_BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _distance(differences: np.ndarray, axis: int) -> np.ndarray:
    """Return how far sums are from zero; rounded, because the same sum in another order differs in its last digits."""
    distances: np.ndarray = np.round(np.abs(np.sum(differences, axis=axis)), 9)
    return distances


def _summary(delta: np.ndarray, p_value: float, p_corrected: float, n_resamples: int, seed: int) -> Comparison:
    low, high = mean_interval(delta, n_resamples=n_resamples, seed=seed)
    wins, losses = int(np.sum(delta > 0)), int(np.sum(delta < 0))
    return Comparison(
        float(np.mean(delta)),
        low,
        high,
        p_value,
        p_corrected,
        wins=wins,
        losses=losses,
        ties=len(delta) - wins - losses,
    )
