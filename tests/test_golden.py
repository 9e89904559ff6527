"""The published checkpoints score as their authors and other projects report; needs a model hub, and gigabytes."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_rerank import QwenScorer

PLANET = "Which planet is known as the Red Planet?"
PLANETS = [
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
]
CAPITAL = "What is the capital of China?"
CARD = [
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
    "responsible for the movement of planets around the sun.",
]

pytestmark = [pytest.mark.network, pytest.mark.timeout(3600)]


def test_the_red_planet_in_float32():
    """From the tests of sentence-transformers, `tests/cross_encoder/test_model.py`."""
    with QwenScorer("Qwen/Qwen3-Reranker-0.6B", dtype="float32") as scorer:
        scores = scorer.score(PLANET, PLANETS)
    np.testing.assert_allclose(scores, [-3.109297752, 7.120389938, -0.378754616, 3.541637421], atol=1e-3)


def test_the_card_probabilities_in_float32():
    """Reported at https://github.com/RBLN-SW/vllm-rbln/issues/841 to four digits."""
    with QwenScorer("Qwen/Qwen3-Reranker-0.6B", dtype="float32") as scorer:
        scores = [scorer.score(CAPITAL, CARD[:1])[0], scorer.score("Explain gravity", CARD[1:])[0]]
    np.testing.assert_allclose(1 / (1 + np.exp(-np.array(scores))), [0.9995, 0.9972], atol=1e-4)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen3-Reranker-0.6B", [7.625, -11.375]),
        ("Qwen/Qwen3-Reranker-4B", [6.4375, -14.375]),
        ("Qwen/Qwen3-Reranker-8B", [5.0625, -14.25]),
    ],
)
def test_the_card_values_in_bfloat16(model, expected):
    """The cards' own values are bfloat16, rounded to 1/16 or 1/8 of a logit."""
    with QwenScorer(model, dtype="bfloat16") as scorer:
        np.testing.assert_allclose(scorer.score(CAPITAL, CARD), expected, atol=0.15)
