"""The values that flow from a query to its ranked documents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np


def text_id(text: str) -> str:
    """Return the id of a document that came as a bare string: 32 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its id and metadata.

    Attributes:
        id: Unique within its collection.
        text: What is embedded and read by the reranker.
        metadata: Carried along unchanged.
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str) -> Document:
        """Return a document whose id is a hash of its text."""
        return cls(text_id(text), text)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document as the first stage gave it.

    Attributes:
        document: The document.
        score: The first stage's own score, higher is better; None where it gave none.
        rank: 1-based place in the first stage's order.
        score_kind: What the score is: "cosine", "ip" (inner product), "bm25", or "fused", which says nothing but the
            order; None where the first stage does not tell.
    """

    document: Document
    score: float | None
    rank: int
    score_kind: str | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """The length of one text beside a query, and how much of it is kept.

    Attributes:
        tokens: Tokens of the whole text. For a text far over its room this is a lower bound above `room`.
        room: Tokens the text may have.
        kept_chars: Characters of the text that are kept when it is cut to `room`; `len(text)` when it fits.
    """

    tokens: int
    room: int
    kept_chars: int

    @property
    def fits(self) -> bool:
        """Whether the whole text is kept."""
        return self.tokens <= self.room


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The scores of one query's documents in input order, with tokens read, characters kept and errors.

    Attributes:
        log_odds: float32 `(n_documents,)`, log-odds of relevance; NaN where a document failed.
        tokens: int32 `(n_documents,)`, prompt tokens that were read, template included; -1 where nobody can tell.
        kept_chars: int32 `(n_documents,)`, characters of the document that were read; -1 where nobody can tell.
        errors: 0-based place of each document that failed to the reason.
    """

    log_odds: np.ndarray
    tokens: np.ndarray
    kept_chars: np.ndarray
    errors: Mapping[int, Exception] = field(default_factory=dict)

    def take(self, places: np.ndarray) -> Self:
        """Return the scores of the documents at `places`, int64 `(n,)`, in that order; NaN and -1 at a place of -1."""
        absent = places < 0
        log_odds, tokens, kept_chars = self.log_odds[places], self.tokens[places], self.kept_chars[places]
        log_odds[absent], tokens[absent], kept_chars[absent] = float("nan"), -1, -1
        errors = {i: self.errors[place] for i, place in enumerate(places.tolist()) if place in self.errors}
        return replace(self, log_odds=log_odds, tokens=tokens, kept_chars=kept_chars, errors=errors)


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document in the final order.

    Attributes:
        document: The document.
        score: Probability of relevance in [0, 1], calibrated where a calibration is loaded; NaN for a failed document.
        log_odds: The scorer's log-odds; NaN for a failed document.
        rank: 1-based place in the result.
        index: 0-based place in the input.
        first_stage_score: The first stage's score, or None.
        truncated: Whether the document was cut to fit.
        windows: How many windows were scored; 1 for a document that fits or was cut.
        best_window: Character span `(start, end)` of the original text that gave the score, or None where the
            scorer cannot tell.
        error: Why the document could not be scored; only with `on_error="last"`.
    """

    document: Document
    score: float
    log_odds: float
    rank: int
    index: int
    first_stage_score: float | None = None
    truncated: bool = False
    windows: int = 1
    best_window: tuple[int, int] | None = None
    error: Exception | None = None
