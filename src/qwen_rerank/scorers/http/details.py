"""What scoring over HTTP gives beside the log-odds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_rerank.scorers.http.log_odds import ScoreKind


@dataclass(frozen=True, slots=True)
class ScoreDetails:
    """The scores of one query.

    Attributes:
        log_odds: float32 `(n,)`, input order.
        reported: float64 `(n,)`, the numbers that the server sent.
        kind: What those numbers are.
        saturated: bool `(n,)`, where a probability so close to 0 or 1 came that its log-odds were clipped at ±20.
        truncated: bool `(n,)`, which documents were cut on this side.
        prompt_tokens: Tokens that the server counted for all of them, or None.
        route: The path that was asked.
    """

    log_odds: np.ndarray
    reported: np.ndarray
    kind: ScoreKind
    saturated: np.ndarray
    truncated: np.ndarray
    prompt_tokens: int | None
    route: str
