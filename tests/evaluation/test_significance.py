"""Paired tests: a real difference is found, none is not invented, several systems are corrected for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.significance import compare, holm


def values(array):
    return {f"q{i}": float(v) for i, v in enumerate(array)}


def test_a_clear_gain_is_significant_and_its_interval_excludes_zero():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.5, 60)

    result = compare(values(base), {"better": values(base + rng.normal(0.1, 0.05, 60))}, n_resamples=2000)["better"]

    assert result.low > 0
    assert result.p_value < 0.01
    assert result.wins + result.losses + result.ties == 60


def test_noise_is_not_significant():
    rng = np.random.default_rng(1)
    base = rng.uniform(0, 1, 60)

    result = compare(values(base), {"same": values(base + rng.normal(0, 0.05, 60))}, n_resamples=2000)["same"]

    assert result.low < 0 < result.high
    assert result.p_value > 0.05


def test_identical_systems_differ_by_exactly_zero():
    base = values([0.1, 0.5, 0.9])

    result = compare(base, {"same": base}, n_resamples=200)["same"]

    assert (result.difference, result.low, result.high, result.ties) == (0.0, 0.0, 0.0, 3)
    assert result.p_value == 1.0


def test_few_queries_are_tested_exactly():
    """With three queries there are eight sign patterns, two of them as extreme as all wins."""
    result = compare(values([0, 0, 0]), {"s": values([0.1, 0.2, 0.3])})["s"]

    assert result.p_value == pytest.approx(0.25)


@pytest.mark.parametrize("seed", range(5))
def test_the_test_counts_sign_patterns(seed):
    """As the definition says it: of all patterns of signs, how many are at least as far from zero; some are even."""
    differences = np.random.default_rng(seed).integers(-4, 5, 9) / 10
    signs = np.array(list(itertools.product((1, -1), repeat=9)))
    distances = np.abs(signs @ differences)
    share = np.mean(distances >= abs(differences.sum()) - 1e-9)

    result = compare(values(np.zeros(9)), {"s": values(differences)}, n_resamples=1000)["s"]

    assert result.p_value == pytest.approx(share)


def test_random_patterns_are_the_same_every_time_and_near_all_of_them():
    differences = np.random.default_rng(3).normal(0.1, 0.3, 12)

    drawn, again, all_of_them = (
        compare(values(np.zeros(12)), {"s": values(differences)}, n_resamples=n)["s"].p_value
        for n in (4000, 4000, 5000)
    )

    assert drawn == again != all_of_them
    assert drawn == pytest.approx(all_of_them, abs=0.02)


def test_one_query_that_changed_proves_nothing():
    assert compare(values([0, 0, 0]), {"s": values([0.5, 0, 0])})["s"].p_value == 1.0


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_other_queries_than_the_baselines_are_refused():
    with pytest.raises(InvalidInputError, match="other queries"):
        compare({"a": 1.0, "b": 0.0}, {"s": {"a": 1.0, "c": 0.0}})
