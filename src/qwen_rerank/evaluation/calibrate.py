"""Calibrations fitted to labelled scores, measures of how good they are, and thresholds with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_rerank.calibration import Calibration, Key, Kind
from qwen_rerank.checks import check_choice, check_probability
from qwen_rerank.documents import Qrels, Run
from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.evaluation.experiment import RunScores

try:
    from scipy.stats import binomtest
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import precision_recall_curve
except ImportError as exc:
    raise MissingExtraError(
        "qwen_rerank.evaluation.calibrate", package="scikit-learn", extra="eval", cause=exc
    ) from exc


N_FOLDS = 5  # of queries: each is judged by a fit on the others


@dataclass(frozen=True, slots=True)
class Labelled:
    """Scored pairs with labels.

    Attributes:
        log_odds: float64 `(n_pairs,)`.
        labels: bool `(n_pairs,)`; unjudged pairs count as not relevant where they were kept.
        queries: int64 `(n_pairs,)`, which query a pair belongs to.
    """

    log_odds: np.ndarray
    labels: np.ndarray
    queries: np.ndarray

    def __post_init__(self) -> None:
        positives = int(self.labels.sum())
        if positives == 0 or positives == len(self.labels):
            raise InvalidInputError(
                f"a calibration needs relevant and other candidates, not {positives} relevant of {len(self.labels)}; check "
                "the labels' document ids, or give more candidates with --depth."
            )

    def of(self, queries: np.ndarray) -> Labelled:
        """Return the pairs of some queries; a query that is named twice counts twice."""
        rows = np.concatenate([np.flatnonzero(self.queries == query) for query in queries])
        return Labelled(self.log_odds[rows], self.labels[rows], self.queries[rows])


def check_wanted(precision: float | None, recall: float | None) -> None:
    """Refuse a precision and a recall at once, or one that is no share."""
    if precision is not None and recall is not None:
        raise InvalidInputError("give a wanted precision or a wanted recall, not both.")
    for name, wanted in (("precision", precision), ("recall", recall)):
        if wanted is not None:
            check_probability(name, wanted)


def check_labels(run: Run, qrels: Qrels, *, judged_only: bool = False) -> None:
    """Refuse, before anything is scored, candidates of which none is relevant or all are.

    Raises:
        InvalidInputError: If there is nothing to fit.
    """
    label(
        {query: {document: 0.0 for document, _ in hits} for query, hits in run.items()}, qrels, judged_only=judged_only
    )


def label(scores: RunScores, qrels: Qrels, *, judged_only: bool = False) -> Labelled:
    """Join scores with judgements.

    Args:
        scores: Query id to document id to log-odds.
        qrels: Query id to document id to grade; above 0 is relevant.
        judged_only: Leave out what nobody judged, instead of counting it as not relevant.
    """
    rows = [
        (log_odds, qrels[query].get(document, 0) > 0, number)
        for number, query in enumerate(qrels)
        for document, log_odds in scores.get(query, {}).items()
        if not judged_only or document in qrels[query]
    ]
    log_odds, labels, queries = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.empty(0),) * 3
    return Labelled(log_odds.astype(np.float64), labels.astype(bool), queries.astype(np.int64))


def fit(pairs: Labelled, *, kind: Kind, fitted_for: Key) -> Calibration:
    """Fit a calibration.

    Args:
        pairs: Labelled scores.
        kind: "platt", two numbers, for hundreds of pairs; "isotonic", a staircase, for thousands.
        fitted_for: `Reranker.calibration_key()` of the reranker that gave the scores.

    Raises:
        InvalidInputError: If relevant pairs do not score higher than others.
    """
    check_choice("kind", kind, ("platt", "isotonic"))
    if kind == "platt":
        model = LogisticRegression(C=np.inf).fit(pairs.log_odds[:, None], pairs.labels)
        a, b = float(model.coef_[0, 0]), float(model.intercept_[0])
        if a <= 0:
            raise InvalidInputError(
                "relevant pairs do not score higher than others, so no probability can be fitted to them."
            )
        return Calibration(kind="platt", fitted_for=fitted_for, a=a, b=b)
    isotonic = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(pairs.log_odds, pairs.labels)
    x, y = isotonic.X_thresholds_, isotonic.y_thresholds_
    return Calibration(kind="isotonic", fitted_for=fitted_for, x=tuple(map(float, x)), y=tuple(map(float, y)))


def cross_fitted(pairs: Labelled, *, kind: Kind, fitted_for: Key, n_folds: int = N_FOLDS, seed: int = 0) -> np.ndarray:
    """Return every pair's probability from a fit on other queries, float64 `(n_pairs,)`: what new queries will see."""
    distinct = np.unique(pairs.queries)
    if len(distinct) < n_folds:
        raise InvalidInputError(
            f"{n_folds} folds need as many queries with labelled candidates, not {len(distinct)}; label more queries."
        )
    probabilities = np.empty(len(pairs.labels))
    for fold in np.array_split(np.random.default_rng(seed).permutation(distinct), n_folds):
        held_out = np.isin(pairs.queries, fold)
        fitted = fit(pairs.of(np.setdiff1d(distinct, fold)), kind=kind, fitted_for=fitted_for)
        probabilities[held_out] = fitted.probability(pairs.log_odds[held_out])
    return probabilities


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of similar probability: how many, what was promised, what came true."""

    n_pairs: int
    predicted: float
    observed: float


def reliability(probabilities: np.ndarray, labels: np.ndarray, *, n_bins: int = 10) -> list[Bin]:
    """Return bins of equal width that hold anything, lowest first."""
    places = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    return [
        Bin(int(inside.sum()), float(probabilities[inside].mean()), float(labels[inside].mean()))
        for inside in (places == place for place in range(n_bins))
        if inside.any()
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance of promise and truth, weighted by pairs (Naeini, Cooper and Hauskrecht 2015)."""
    total = sum(b.n_pairs for b in bins)
    return sum(b.n_pairs * abs(b.predicted - b.observed) for b in bins) / total


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared error of the probabilities (Brier 1950), 0 best."""
    return float(np.mean((probabilities - labels) ** 2))


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold and what it keeps.

    Attributes:
        value: Least probability of a document that is kept.
        precision: Share of the kept documents that are relevant.
        precision_interval: Its 95 % interval: the wider of the bootstrap over queries and Wilson's over documents, as the
            first has no width where few documents are kept.
        recall: Share of the relevant candidates that are kept.
        recall_interval: Its 95 % interval, made in the same way.
        n_kept: Documents that are kept, of those with labels.
        n_relevant: Documents that are relevant.
    """

    value: float
    precision: float
    precision_interval: tuple[float, float]
    recall: float
    recall_interval: tuple[float, float]
    n_kept: int
    n_relevant: int


def threshold_for(
    pairs: Labelled,
    probabilities: np.ndarray,
    *,
    precision: float | None = None,
    recall: float | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Threshold:
    """Return the lowest threshold that reaches a wanted precision, or the highest that reaches a wanted recall.

    Args:
        pairs: Labelled scores.
        probabilities: Of the pairs, best from `cross_fitted`.
        precision: Wanted precision in [0, 1]; give this or `recall`.
        recall: Wanted recall of the relevant among the candidates, in [0, 1].
        n_resamples: Bootstrap draws of queries.
        seed: Of the draws.

    Raises:
        InvalidInputError: If both or neither are given, or no threshold reaches the wanted precision.
    """
    if (precision is None) == (recall is None):
        raise InvalidInputError("give a wanted precision or a wanted recall, one of them.")
    precisions, recalls, values = precision_recall_curve(pairs.labels, probabilities)  # by rising threshold
    precisions, recalls = precisions[:-1], recalls[:-1]  # the last is that of no document at all
    if precision is not None:
        reached = np.flatnonzero(precisions >= check_probability("precision", precision))
        if not len(reached):
            raise InvalidInputError(
                f"no threshold reaches a precision of {precision}; the best that one reaches is {precisions.max():.3f}."
            )
        place = reached[0]
    else:
        place = np.flatnonzero(recalls >= check_probability("recall", recall))[-1]
    value = float(values[place])
    kept = probabilities >= value
    n_kept, n_relevant, n_true = int(kept.sum()), int(pairs.labels.sum()), int((kept & pairs.labels).sum())
    low, high = np.nanpercentile(_resampled(pairs, kept, n_resamples, seed), [2.5, 97.5], axis=0)
    return Threshold(
        value,
        float(precisions[place]),
        _at_least_wilson((float(low[0]), float(high[0])), n_true, n_kept),
        float(recalls[place]),
        _at_least_wilson((float(low[1]), float(high[1])), n_true, n_relevant),
        n_kept,
        n_relevant,
    )


def _at_least_wilson(interval: tuple[float, float], n_true: int, n: int) -> tuple[float, float]:
    """Return an interval widened to Wilson's (1927, doi:10.1080/01621459.1927.10502953) where that is wider."""
    wilson = binomtest(n_true, n).proportion_ci(method="wilson")
    return min(interval[0], float(wilson.low)), max(interval[1], float(wilson.high))


def _resampled(pairs: Labelled, kept: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Return precision and recall of bootstrap draws of whole queries, float64 `(n_resamples, 2)`."""
    distinct, place = np.unique(pairs.queries, return_inverse=True)
    counts = np.stack(
        [
            np.bincount(place, weights=column, minlength=len(distinct))
            for column in (kept & pairs.labels, kept, pairs.labels)
        ]
    )
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(distinct), size=(n_resamples, len(distinct)))
    true, positive, relevant = counts[:, drawn].sum(axis=2)
    with np.errstate(invalid="ignore"):
        return np.stack([true / positive, true / relevant], axis=1)
