"""Evaluations as plain dictionaries: what is written as JSON, and all that the report is drawn from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from qwen_rerank.calibration import Calibration, Kind, sigmoid
from qwen_rerank.documents import Qrels, Run, write_whole
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.calibrate import (
    Labelled,
    brier,
    cross_fitted,
    expected_calibration_error,
    fit,
    label,
    reliability,
    threshold_for,
)
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.evaluation.experiment import RunScores
from qwen_rerank.evaluation.explain import Move, largest_moves
from qwen_rerank.evaluation.measures import DEFAULT_MEASURES, measure
from qwen_rerank.evaluation.provenance import POCKET, QWEN3_EMBEDDING, environment, in_domain
from qwen_rerank.evaluation.significance import compare
from qwen_rerank.evaluation.sweep import Outcome, Recommendation, pareto
from qwen_rerank.reranker import Reranker

FEW_QUERIES = 20  # below it an interval of resampled queries is too narrow
FEW_DOCUMENTS = 30  # kept by a threshold, below which its precision is hardly known
_NUMBERS = re.compile(r"\[\n\s*([-+.,0-9eE\s]+?)\n\s*\]")  # strings hold no line break, so none of them matches
_TEXT_CHARS = 300  # of a document shown as an example
_HISTOGRAM_BINS = 40


def write_result(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a result as JSON, a list of numbers on one line, whole or not at all."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(_NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n", path)


def about(collection: Collection) -> dict[str, Any]:
    """Return what a reader must know of the collection, a flag for training data included."""
    notes = list(collection.notes)
    if len(collection.queries) < FEW_QUERIES:
        notes.append(
            f"{len(collection.queries)} queries are too few to tell systems apart: the intervals of so few are too narrow"
        )
    if training_set := in_domain(collection.name):
        notes.append(f"in-domain for Qwen3-Reranker: its training data holds {training_set}")
    if training_set := in_domain(collection.name, training=QWEN3_EMBEDDING):
        notes.append(f"in-domain for Qwen3-Embedding: its training data holds {training_set}")
    if training_set := in_domain(collection.name, training=POCKET):
        notes.append(f"in-domain for the pocket models: they were trained on {training_set}")
    return {
        "name": collection.name,
        "split": collection.split,
        "n_documents": len(collection.documents),
        "n_queries": len(collection.queries),
        "notes": notes,
    }


def run_result(
    collection: Collection,
    baseline: str,
    runs: Mapping[str, Run],
    *,
    scores: RunScores | None = None,
    measures: Sequence[str] = DEFAULT_MEASURES,
    primary: str = "nDCG@10",
    n_examples: int = 10,
    reranks: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare runs with one of them, and each reranked run with the first stage that it reranks.

    Args:
        collection: What was searched.
        baseline: Name of the run that the others are compared with, usually the first stage alone.
        runs: Name to run, the baseline among them.
        scores: Log-odds of a reranker, for the histogram.
        measures: What is measured.
        primary: The measure that is compared.
        n_examples: Queries shown as most helped and most hurt by the last run.
        reranks: Name of a reranked run to the name of its first stage's.
        settings: What the runs were made with, for readers.
    """
    names = tuple(dict.fromkeys((primary, *measures)))
    measured = {name: measure(run, collection.qrels, names) for name, run in runs.items()}
    values = {name: result.per_query[primary] for name, result in measured.items()}
    compared = compare(values[baseline], {name: v for name, v in values.items() if name != baseline})
    gains = _gains(values, reranks or {})
    last = list(runs)[-1]
    before = (reranks or {}).get(last, baseline)
    helped, hurt = largest_moves(collection, (runs[before], values[before]), (runs[last], values[last]), n=n_examples)
    return {
        "kind": "run",
        "environment": environment(),
        "collection": about(collection),
        "settings": dict(settings or {}),
        "primary": primary,
        "measures": names,
        "systems": [
            {
                "label": name,
                "means": result.means,
                "n_missing": result.n_missing,
                "comparison": asdict(compared[name]) if name in compared else None,
                "reranks": (reranks or {}).get(name),
                "gain": gains.get(name),
                "deltas": [round(values[name][query] - values[baseline][query], 6) for query in collection.queries],
            }
            for name, result in measured.items()
        ],
        "examples_of": last,
        "examples_against": before,
        "scores": None if scores is None else _histogram(scores, collection),
        "helped": [_example(move) for move in helped],
        "hurt": [_example(move) for move in hurt],
    }


def _gains(values: Mapping[str, Mapping[str, float]], reranks: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the comparison of each reranked run with its first stage; Holm's correction is over those of one first stage."""
    gains: dict[str, dict[str, Any]] = {}
    for first in dict.fromkeys(reranks.values()):
        compared = compare(values[first], {name: values[name] for name in reranks if reranks[name] == first})
        gains |= {name: asdict(comparison) for name, comparison in compared.items()}
    return gains


def _example(move: Move) -> dict[str, Any]:
    row = asdict(move)
    return row | {name: row[name][:_TEXT_CHARS] for name in ("top_before", "top_after")}


def _histogram(scores: RunScores, collection: Collection) -> dict[str, list[float]] | None:
    """Return how many relevant and other candidates lie between the edges; None where there are not both."""
    try:
        pairs = label(scores, collection.qrels)
    except InvalidInputError:
        return None
    edges = np.histogram_bin_edges(pairs.log_odds, bins=_HISTOGRAM_BINS)
    counts = {
        name: np.histogram(pairs.log_odds[chosen], bins=edges)[0].tolist()
        for name, chosen in (("relevant", pairs.labels), ("others", ~pairs.labels))
    }
    return {"edges": np.round(edges, 4).tolist(), **counts}


def sweep_result(
    collection: Collection,
    outcomes: Sequence[Outcome],
    recommendation: Recommendation,
    *,
    primary: str = "nDCG@10",
    rerankers: Mapping[str, Reranker] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a sweep: every outcome, the Pareto fronts, the recommendation, and what the rerankers' names stand for."""
    by_cost = [] if outcomes[0].cost is None else pareto(outcomes, primary=primary, price=lambda o: o.cost or 0.0)
    return {
        "kind": "sweep",
        "environment": environment(),
        "collection": about(collection),
        "settings": dict(settings or {}),
        "primary": primary,
        "measures": list(outcomes[0].means),
        "rerankers": {name: dict(reranker.calibration_key()) for name, reranker in (rerankers or {}).items()},
        "outcomes": [_outcome(outcome) for outcome in outcomes],
        "front": [outcome.label for outcome in pareto(outcomes, primary=primary, price=lambda o: o.p95_ms)],
        "front_by_cost": [outcome.label for outcome in by_cost],
        "recommendation": recommendation.sentence,
        "recommended": None if recommendation.outcome is None else recommendation.outcome.label,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    per_query = [round(value, 6) for value in outcome.per_query.values()]
    return {**asdict(outcome), "per_query": per_query, "label": outcome.label}


def calibration_result(
    collection: Collection,
    reranker: Reranker,
    scores: RunScores,
    *,
    kind: Kind = "platt",
    precision: float | None = None,
    recall: float | None = None,
    judged_only: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Calibration, dict[str, Any]]:
    """Fit a calibration on a collection's labels and say how good it is on queries that a fit has not seen.

    Args:
        collection: Queries with judgements.
        reranker: Gave the scores; the calibration is bound to its settings.
        scores: Query id to document id to log-odds.
        kind: "platt" or "isotonic".
        precision: Wanted precision, for a threshold.
        recall: Wanted recall, for a threshold; at most one of both.
        judged_only: Leave out what nobody judged.
        settings: What the scores were made with, for readers.
    """
    pairs: Labelled = label(scores, collection.qrels, judged_only=judged_only)
    key = reranker.calibration_key()
    calibration = fit(pairs, kind=kind, fitted_for=key)
    held_out = cross_fitted(pairs, kind=kind, fitted_for=key)
    wanted = precision is not None or recall is not None
    threshold = threshold_for(pairs, held_out, precision=precision, recall=recall) if wanted else None
    return calibration, {
        "kind": "calibration",
        "environment": environment(),
        "collection": about(collection),
        "settings": dict(settings or {}),
        "fitted_for": dict(key),
        "n_pairs": len(pairs.labels),
        "n_relevant": int(pairs.labels.sum()),
        "sigmoid": _quality(sigmoid(pairs.log_odds), pairs.labels),
        "calibrated": _quality(held_out, pairs.labels),
        "threshold": None if threshold is None else asdict(threshold),
    }


def threshold_sentence(threshold: Mapping[str, Any]) -> str:
    """Return a threshold of a calibration's result in one sentence."""
    parts = [
        f"{what} {threshold[name]:.3f} ({threshold[name + '_interval'][0]:.3f} … {threshold[name + '_interval'][1]:.3f})"
        for name, what in (("precision", "precision"), ("recall", "recall of the candidates"))
    ]
    sentence = f"Threshold {threshold['value']:.3f}: {', '.join(parts)}."
    n_kept = threshold.get("n_kept", FEW_DOCUMENTS)
    if n_kept < FEW_DOCUMENTS:
        documents = "1 document is" if n_kept == 1 else f"{n_kept} documents are"
        sentence += (
            f" Only {documents} kept by it, too few to rely on that precision: label more queries, or ask for less."
        )
    return sentence


def compare_result(runs: Mapping[str, Run], qrels: Qrels, *, primary: str) -> list[dict[str, Any]]:
    """Compare runs with the first of them on one measure."""
    measured = {label: measure(run, qrels, [primary]) for label, run in runs.items()}
    values = {label: result.per_query[primary] for label, result in measured.items()}
    baseline, *others = values
    compared = compare(values[baseline], {label: values[label] for label in others})
    return [
        {
            "label": label,
            "mean": result.means[primary],
            "comparison": asdict(compared[label]) if label in compared else None,
            "n_missing": result.n_missing,
            "n_unjudged": result.n_unjudged,
        }
        for label, result in measured.items()
    ]


def _quality(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    bins = reliability(probabilities, labels)
    return {
        "ece": expected_calibration_error(bins),
        "brier": brier(probabilities, labels),
        "bins": [asdict(b) for b in bins],
    }
