"""Log-odds → a probability that means something, bound to what it was fitted for.

A calibration is monotone: it says what a score is worth and never changes an order. It holds for one scorer, one
instruction and one way of reading long documents; a reranker with any other refuses it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qwen_rerank.bounded_json import loads
from qwen_rerank.checks import is_finite
from qwen_rerank.errors import CalibrationError, CalibrationMismatchError
from qwen_rerank.regular_files import read_regular

Key = Mapping[str, str | float | None]
Kind = Literal["platt", "isotonic"]

FORMAT = "qwen-rerank-calibration"
VERSION = 1
_MOST_BYTES = 1 << 24
_FIELDS = {"platt": ("a", "b"), "isotonic": ("x", "y")}


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Return `1 / (1 + exp(-log_odds))` as float64 of the same shape, without overflow; NaN stays NaN."""
    values = np.asarray(log_odds, dtype=np.float64)
    small = np.exp(-np.abs(values))
    return np.asarray(np.where(values >= 0, 1.0, small) / (1.0 + small))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A monotone map from log-odds to probability.

    Attributes:
        kind: "platt": `sigmoid(a * log_odds + b)` (Platt 1999). "isotonic": straight lines between the knots `(x, y)`,
            constant outside them.
        fitted_for: What it holds for, as `Reranker.calibration_key` says it.
        a: Slope, above 0 (platt).
        b: Offset (platt).
        x: Log-odds of the knots, strictly rising (isotonic).
        y: Probabilities of the knots, never falling (isotonic).
    """

    kind: Kind
    fitted_for: Key
    a: float = 1.0
    b: float = 0.0
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise CalibrationError(f"kind must be 'platt' or 'isotonic', not {self.kind!r}.")
        _check_key(self.fitted_for)
        if self.kind == "platt":
            self._check_platt()
        else:
            self._check_isotonic()

    def _check_platt(self) -> None:
        if not (is_finite(self.a) and is_finite(self.b)):
            raise CalibrationError(f"a and b must be finite numbers, not {self.a!r} and {self.b!r}.")
        if self.a <= 0:
            raise CalibrationError(f"a must be above 0, not {self.a!r}: a calibration never reverses an order.")

    def _check_isotonic(self) -> None:
        if len(self.x) != len(self.y) or not self.x:
            raise CalibrationError(
                f"x and y must be equally many knots, at least one, not {len(self.x)} and {len(self.y)}."
            )
        if not all(map(is_finite, (*self.x, *self.y))):
            raise CalibrationError("x and y must be finite numbers.")
        if any(right <= left for left, right in zip(self.x, self.x[1:], strict=False)):
            raise CalibrationError("x must rise strictly from knot to knot.")
        if any(right < left for left, right in zip(self.y, self.y[1:], strict=False)):
            raise CalibrationError("y must not fall from knot to knot: a calibration never reverses an order.")
        if not (self.y[0] >= 0 and self.y[-1] <= 1):
            raise CalibrationError(f"y must lie between 0 and 1, not between {self.y[0]!r} and {self.y[-1]!r}.")

    def probability(self, log_odds: np.ndarray) -> np.ndarray:
        """Return the probability of relevance, float64 in [0, 1], of the shape of `log_odds`; NaN stays NaN."""
        values = np.asarray(log_odds, dtype=np.float64)
        if self.kind == "platt":
            return sigmoid(self.a * values + self.b)
        return np.interp(values, self.x, self.y)

    def check(self, key: Key) -> None:
        """Refuse a reranker that this calibration was not fitted for.

        Raises:
            CalibrationMismatchError: If `key` differs; the message names every difference.
        """
        names = sorted(name for name in {*key, *self.fitted_for} if key.get(name) != self.fitted_for.get(name))
        if names:
            differences = "; ".join(
                f"{name} was {self.fitted_for.get(name)!r} and is now {key.get(name)!r}" for name in names
            )
            cure = "Fit a calibration for these settings, or use the settings it was fitted for"
            if "scorer" in names:  # a fingerprint, which tells nobody what it was made of
                cure += (
                    " (a scorer is its model, template, default instruction, max_length and number format: give the same "
                    "dtype= and quantize=, such as dtype='float32' where 'auto' took that)"
                )
            raise CalibrationMismatchError(f"this calibration was fitted for something else: {differences}. {cure}.")

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON."""
        body = {"format": FORMAT, "version": VERSION, "kind": self.kind, "fitted_for": dict(self.fitted_for)}
        body |= {name: getattr(self, name) for name in _FIELDS[self.kind]}
        Path(path).write_text(json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration that `save` wrote.

        Raises:
            CalibrationError: If the file is missing or is not exactly what `save` writes; the message names the file.
        """
        try:
            body = loads(read_regular(path, most_bytes=_MOST_BYTES))
            return cls(**_arguments(body))
        except CalibrationError as exc:
            raise CalibrationError(f"{path}: {exc}") from exc
        except (OSError, ValueError) as exc:
            raise CalibrationError(f"{path} cannot be read as a calibration ({exc}).") from exc


def _arguments(body: object) -> dict[str, Any]:
    """Return the constructor's arguments from a file's content."""
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CalibrationError(f"the file is no calibration: its format is not {FORMAT!r}.")
    if body.get("version") != VERSION:
        raise CalibrationError(f"version {body.get('version')!r} is not {VERSION}, the one this package reads.")
    kind = body.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise CalibrationError(f"kind must be 'platt' or 'isotonic', not {kind!r}.")
    expected = {"format", "version", "kind", "fitted_for", *_FIELDS[kind]}
    if set(body) != expected:
        raise CalibrationError(f"the fields must be {sorted(expected)}, not {sorted(body)}.")
    values = {name: body[name] for name in ("kind", "fitted_for", *_FIELDS[kind])}
    if kind == "isotonic":
        if not isinstance(values["x"], list) or not isinstance(values["y"], list):
            raise CalibrationError("x and y must be lists of numbers.")
        values |= {"x": tuple(values["x"]), "y": tuple(values["y"])}
    return values


def _check_key(key: object) -> None:
    if not isinstance(key, Mapping) or not key:
        raise CalibrationError("fitted_for must say what the calibration holds for; take Reranker.calibration_key().")
    for name, value in key.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str) or is_finite(value)):
            raise CalibrationError(f"fitted_for[{name!r}] must be a string, a number or null, not {value!r}.")
