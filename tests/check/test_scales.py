"""Which prompt and scale reported scores fit, and when nobody can tell."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_rerank.check.scales import CLOSE, Hypothesis, decide, match

RIGHT = np.array([-3.0, 7.0, -0.4, 3.5, 1.0])
OTHER = np.array([-1.0, 5.0, 0.4, 2.0, 3.0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def nearest(reported, *vectors):
    found, _ = decide(match(reported, [Hypothesis(f"p{i}", "true", vector) for i, vector in enumerate(vectors)]))
    return [(m.hypothesis.prompt, m.scale.key) for m in found]


@pytest.mark.parametrize(
    ("reported", "scale"),
    [
        (sigmoid(RIGHT), "probability"),
        (RIGHT, "logit"),
        (sigmoid(sigmoid(RIGHT)), "sigmoid-twice"),
        (sigmoid(-RIGHT), "labels-swapped"),
    ],
)
def test_prompt_and_scale_are_found_together(reported, scale):
    assert nearest(reported, OTHER, RIGHT) == [("p1", scale)]


def test_scores_between_two_prompts_fit_both():
    middle = RIGHT + 0.1

    assert sorted(nearest(sigmoid(RIGHT + 0.05), RIGHT, middle)) == [("p0", "probability"), ("p1", "probability")]


def test_prompts_that_give_the_same_scores_are_not_told_apart():
    assert len(nearest(sigmoid(RIGHT), RIGHT, RIGHT + 0.001)) == 2


def test_scores_far_from_every_prompt_fit_none():
    assert nearest(sigmoid(RIGHT + 3 * CLOSE * np.array([1, -1, 1, -1, 1])), RIGHT, OTHER) == []


def test_saturated_probabilities_still_count():
    assert nearest(np.array([0.0, 1.0, 0.5]), np.array([-15.0, 18.0, 0.0]), np.array([15.0, 1.0, 0.0])) == [
        ("p0", "probability")
    ]
