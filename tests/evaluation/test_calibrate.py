"""Calibration: promises that come true, thresholds that keep theirs, and an order that never changes."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

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
from qwen_rerank.evaluation.results import threshold_sentence

KEY = {"scorer": "test", "instruction": None, "long_documents": "truncate"}


@pytest.fixture(scope="module")
def overconfident():
    """Pairs whose true log-odds are a third of what the scorer says, less two."""
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 6, 4000)
    truth = 1 / (1 + np.exp(-(log_odds / 3 - 2)))
    return Labelled(log_odds, rng.random(4000) < truth, np.repeat(np.arange(200), 20))


def test_platt_finds_the_slope_and_offset(overconfident):
    calibration = fit(overconfident, kind="platt", fitted_for=KEY)

    assert calibration.a == pytest.approx(1 / 3, abs=0.03)
    assert calibration.b == pytest.approx(-2, abs=0.15)


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_promises_come_true_on_queries_that_were_not_fitted(overconfident, kind):
    raw = 1 / (1 + np.exp(-overconfident.log_odds))
    fitted = cross_fitted(overconfident, kind=kind, fitted_for=KEY)

    errors = [expected_calibration_error(reliability(p, overconfident.labels)) for p in (raw, fitted)]
    assert errors[1] < 0.03 < errors[0]
    assert brier(fitted, overconfident.labels) < brier(raw, overconfident.labels)


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_the_order_never_changes(overconfident, kind):
    rising = np.sort(overconfident.log_odds)

    assert np.all(np.diff(fit(overconfident, kind=kind, fitted_for=KEY).probability(rising)) >= 0)


def test_a_saved_calibration_gives_the_same_probabilities(overconfident, tmp_path):
    calibration = fit(overconfident, kind="isotonic", fitted_for=KEY)
    calibration.save(tmp_path / "c.json")

    loaded = type(calibration).load(tmp_path / "c.json")

    assert np.array_equal(loaded.probability(overconfident.log_odds), calibration.probability(overconfident.log_odds))


def test_a_threshold_reaches_the_wanted_precision_and_says_how_sure_that_is(overconfident):
    probabilities = cross_fitted(overconfident, kind="platt", fitted_for=KEY)

    threshold = threshold_for(overconfident, probabilities, precision=0.8, n_resamples=200)

    kept = probabilities >= threshold.value
    assert threshold.precision == pytest.approx(overconfident.labels[kept].mean())
    assert threshold.precision >= 0.8
    assert threshold.precision_interval[0] < threshold.precision < threshold.precision_interval[1]


def test_a_threshold_for_recall_is_the_highest_that_reaches_it():
    pairs = Labelled(np.array([3.0, 2, 1, 0]), np.array([True, False, True, False]), np.array([0, 0, 1, 1]))

    threshold = threshold_for(pairs, np.array([0.9, 0.8, 0.7, 0.6]), recall=1.0, n_resamples=50)

    assert (threshold.value, threshold.recall, threshold.precision) == (0.7, 1.0, pytest.approx(2 / 3))


def test_equal_probabilities_are_kept_or_dropped_together():
    pairs = Labelled(np.array([2.0, 1, 1, 0]), np.array([True, True, False, False]), np.array([0, 0, 1, 1]))

    with pytest.raises(InvalidInputError, match=r"best that one reaches is 0\.667"):
        threshold_for(pairs, np.array([0.5, 0.5, 0.5, 0.1]), precision=0.9)


def test_unjudged_pairs_count_as_not_relevant_unless_left_out():
    scores = {"q": {"a": 2.0, "b": 1.0, "c": 0.0}}
    qrels = {"q": {"a": 1, "b": 0}}

    assert len(label(scores, qrels).labels) == 3
    assert len(label(scores, qrels, judged_only=True).labels) == 2


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_pairs_of_one_kind_are_refused(labels):
    with pytest.raises(InvalidInputError, match="relevant and other candidates"):
        Labelled(np.array([1.0, 2.0]), np.array(labels), np.array([0, 1]))


def test_scores_that_say_the_opposite_are_refused():
    pairs = Labelled(np.array([-3.0, -2, 2, 3]), np.array([True, True, False, False]), np.arange(4))

    with pytest.raises(InvalidInputError, match="do not score higher"):
        fit(pairs, kind="platt", fitted_for=KEY)


def test_one_document_is_no_proof_of_a_precision():
    """All draws of the bootstrap agree about one kept document, and nobody should."""
    rng = np.random.default_rng(0)
    probabilities = rng.random(266) * 0.8
    labels = rng.random(266) < 0.2
    probabilities[0], labels[0] = 0.99, True
    pairs = Labelled(np.log(probabilities), labels, np.repeat(np.arange(38), 7))

    threshold = threshold_for(pairs, probabilities, precision=0.99, n_resamples=200)

    assert (threshold.n_kept, threshold.precision) == (1, 1.0)
    assert threshold.precision_interval == pytest.approx((0.2065, 1.0), abs=1e-3)  # Wilson's for 1 of 1
    assert "Only 1 document is kept by it, too few to rely on that precision" in threshold_sentence(asdict(threshold))
