"""Deterministic scorers and embedders without weights, for users' tests and ours."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qwen_rerank.checks import check_texts
from qwen_rerank.errors import ScorerError
from qwen_rerank.scorers.base import BaseScorer, ScoreRequest, unscored
from qwen_rerank.types import Fit, Scores

_WORD = re.compile(r"[\u3400-\u9fff]|\w+")


def words(text: str) -> list[str]:
    """Return lower-cased words; every Han character is a word of its own."""
    return _WORD.findall(text.lower())


class TableScorer(BaseScorer):
    """Looks every text up in a table of log-odds; a text that is not there fails.

    Args:
        table: Text to log-odds.
        delay_s: Seconds that each query takes, for tests of concurrency.

    Attributes:
        calls: Query, distinct texts and instruction of everything that was scored.
    """

    def __init__(self, table: Mapping[str, float], *, delay_s: float = 0.0) -> None:
        self.name = "table"
        self.fingerprint = "table"
        self.calls: list[tuple[str, list[str], str | None]] = []
        self._table = dict(table)
        self._delay_s = delay_s

    def _compute(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        return [self._look_up(request) for request in requests]

    def _look_up(self, request: ScoreRequest) -> Scores:
        self.calls.append((request.query, request.texts, request.instruction))
        if self._delay_s:
            time.sleep(self._delay_s)
        errors = {
            i: ScorerError(f"{text!r} is not in the table")
            for i, text in enumerate(request.texts)
            if text not in self._table
        }
        values = [self._table.get(text, np.nan) for text in request.texts]
        return replace(unscored(len(values), errors), log_odds=np.array(values, dtype=np.float32))


class OverlapScorer(BaseScorer):
    """Scores by the share of the query's words that a document holds: log-odds from -4 (none) to 4 (all).

    Args:
        max_words: Room for a document in words; the rest of a longer document is not read.
    """

    def __init__(self, *, max_words: int = 512) -> None:
        self.name = "overlap"
        self.fingerprint = f"overlap-{max_words}"
        self.max_words = max_words

    def _compute(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        return [self._overlap(request) for request in requests]

    def _overlap(self, request: ScoreRequest) -> Scores:
        wanted = set(words(request.query))
        values = [
            8.0 * len(wanted & set(words(text)[: self.max_words])) / max(1, len(wanted)) - 4.0 for text in request.texts
        ]
        fits = self._measure(request.query, request.texts, request.instruction)
        return Scores(
            log_odds=np.array(values, dtype=np.float32),
            tokens=np.array([min(fit.tokens, fit.room) for fit in fits], dtype=np.int32),
            kept_chars=np.array([fit.kept_chars for fit in fits], dtype=np.int32),
        )

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        """Count words as tokens."""
        fits = []
        for text in texts:
            ends = [match.end() for match in _WORD.finditer(text.lower())]
            kept = len(text) if len(ends) <= self.max_words else ends[self.max_words - 1]
            fits.append(Fit(tokens=len(ends), room=self.max_words, kept_chars=kept))
        return fits


class HashEmbedder:
    """Bag of hashed words, L2-normalised float32; a text without words gives a zero row."""

    def __init__(self, dim: int = 64) -> None:
        self.dim = dim
        self.fingerprint = f"hash-{dim}"

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`."""
        return self.embed_documents(texts)

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`."""
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(check_texts("texts", texts)):
            for word in words(text):
                digest = hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest()
                value = int.from_bytes(digest, "little")
                out[row, value % self.dim] += 1.0 if value >> 63 else -1.0
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return np.asarray(np.divide(out, norms, out=np.zeros_like(out), where=norms > 0))
