"""Turns what servers report into log-odds of relevance, keeping the reported order."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np

ScoreKind = Literal["logit", "probability", "relevance", "raw"]
"""What a server's number is.

logit        log-odds of relevance.
probability  the sigmoid of it, in [0, 1].
relevance    in [0, 1], but no probability of relevance: only the order means something.
raw          any number: only the order means something.
"""

UNCALIBRATED = frozenset({"relevance", "raw"})
LIMIT = 20.0  # 1 - sigmoid(20) is 2e-9: beyond it a printed probability holds no more information


def to_log_odds(scores: np.ndarray, kind: ScoreKind) -> tuple[np.ndarray, np.ndarray]:
    """Return log-odds, float32 `(n,)`, and which of them were clipped, bool `(n,)`.

    Probabilities are converted in float64 and clipped at ±20. Scores that differ stay different and in order even
    where clipping or float32 would make them equal.

    Args:
        scores: float64 `(n,)`, finite; in [0, 1] for kinds "probability" and "relevance".
        kind: What the numbers are.
    """
    if kind in ("probability", "relevance"):
        with np.errstate(divide="ignore"):
            exact = np.log(scores) - np.log1p(-scores)
        saturated = np.abs(exact) > LIMIT
        exact = np.clip(exact, -LIMIT, LIMIT)
    else:
        exact, saturated = scores, np.zeros(len(scores), dtype=bool)
    largest = float(np.finfo(np.float32).max)
    return _keep_order(np.clip(exact, -largest, largest).astype(np.float32), scores), saturated


def _keep_order(values: np.ndarray, reported: np.ndarray) -> np.ndarray:
    """Move values that rounding made equal apart by one step of float32, towards zero, in the reported order."""
    order = np.argsort(reported, kind="stable")
    out = values.copy()
    _separate([i for i in order[::-1] if values[i] >= 0], out, reported, np.float32(-np.inf))
    _separate([i for i in order if values[i] < 0], out, reported, np.float32(np.inf))
    return out


def _separate(outermost_first: list[int], out: np.ndarray, reported: np.ndarray, towards: np.float32) -> None:
    for previous, i in pairwise(outermost_first):
        if reported[i] == reported[previous]:
            out[i] = out[previous]
        elif abs(out[i]) >= abs(out[previous]):
            out[i] = np.nextafter(out[previous], towards)
