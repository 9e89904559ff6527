"""Scales of reported numbers (logits, probabilities, …), and the known prompts that fit reported scores best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CLOSE = 0.35  # root mean square difference of log-odds that bfloat16 and other kernels explain
CLEARLY = 0.5  # the nearest hypothesis must be at most this share as far as the next
SAME = 0.02  # hypotheses that differ by less are one
_EPS = 1e-12
_SEEN = 12.0  # log-odds beyond this say little once they were a printed probability


def _logit(p: np.ndarray) -> np.ndarray:
    clipped = np.clip(p, _EPS, 1 - _EPS)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def _twice(p: np.ndarray) -> np.ndarray:
    return _logit(_logit(p))


@dataclass(frozen=True, slots=True)
class Scale:
    """A meaning of reported numbers: whether they can have it, and the log-odds behind them."""

    key: str
    title: str
    possible: Callable[[np.ndarray], bool]
    log_odds: Callable[[np.ndarray], np.ndarray]


SCALES = (
    Scale("probability", "probabilities", lambda r: bool(np.all((r >= 0) & (r <= 1))), _logit),
    Scale("logit", "logits", lambda r: True, lambda r: r),
    Scale("sigmoid-twice", "a sigmoid of probabilities", lambda r: bool(np.all((r >= 0.5) & (r <= 0.7311))), _twice),
    Scale(
        "labels-swapped",
        "probabilities of the other label",
        lambda r: bool(np.all((r >= 0) & (r <= 1))),
        lambda r: -_logit(r),
    ),
)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Log-odds that some prompt and head would give, float64 `(n,)`."""

    prompt: str
    head: str
    log_odds: np.ndarray


@dataclass(frozen=True, slots=True)
class Match:
    """A hypothesis under a scale, and how far from the reported scores it is."""

    hypothesis: Hypothesis
    scale: Scale
    distance: float


def match(reported: np.ndarray, hypotheses: Sequence[Hypothesis]) -> list[Match]:
    """Return every hypothesis under every possible scale, nearest first.

    Args:
        reported: float64 `(n,)`, as the server sent them.
        hypotheses: What each known prompt would have given.
    """
    found = []
    for scale in SCALES:
        if not scale.possible(reported):
            continue
        seen = np.clip(scale.log_odds(reported), -_SEEN, _SEEN)
        for hypothesis in hypotheses:
            gap = seen - np.clip(hypothesis.log_odds, -_SEEN, _SEEN)
            found.append(Match(hypothesis, scale, float(np.sqrt(np.mean(gap**2)))))
    return sorted(found, key=lambda m: m.distance)


def decide(matches: Sequence[Match]) -> tuple[list[Match], Match | None]:
    """Return the matches that cannot be told from the nearest, and the next one that can.

    An empty list means that even the nearest is too far away.
    """
    best = matches[0]
    if best.distance > CLOSE:
        return [], best
    # Two hypotheses that give the same numbers are one as far as anybody can see.
    reach = max(best.distance / CLEARLY, SAME)
    rivals = [m for m in matches if m.distance < reach]
    return rivals, next((m for m in matches if m.distance >= reach), None)
