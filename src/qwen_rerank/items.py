"""Candidates on their way through a reranker: what is read of each, what is scored for it, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_rerank.errors import (
    DocumentScoringError,
    DocumentTooLongError,
    InvalidInputError,
    NonFiniteScoreError,
    ScorerError,
)
from qwen_rerank.passages import Aggregate, Span, fold
from qwen_rerank.types import Candidate, Document, Fit, RankedDocument

Rankable = str | Document | Candidate
Outcome = np.ndarray | DocumentScoringError


@dataclass(slots=True)
class Item:
    """One candidate on its way: what is scored for it, and what came of it."""

    document: Document
    first_stage_score: float | None
    spans: list[Span] = field(default_factory=list)  # what is read of the text
    texts: list[str] = field(default_factory=list)  # what the scorer gets for each span
    slots: list[int] = field(default_factory=list)  # where the job holds each text
    located: bool = True  # whether the spans are known, or the scorer cannot tell
    truncated: bool = False
    error: Exception | None = None
    log_odds: float = math.nan
    best: int = 0

    def take_windows(self, spans: list[Span] | DocumentTooLongError, aggregate: Aggregate) -> None:
        """Read the text in windows, as many as count."""
        if isinstance(spans, DocumentTooLongError):
            self.error = spans
            return
        self.spans = spans[:1] if aggregate == "first" else spans
        self.truncated = len(self.spans) < len(spans)
        self.texts = [self.document.text[start:end] for start, end in self.spans]

    def take_whole_or_fail(self, fit: Fit) -> None:
        """Read the whole text, and nothing of a text that does not fit."""
        if fit.fits:
            self.take_beginning(fit)
        else:
            self.error = DocumentTooLongError(
                f"the document has at least {fit.tokens} tokens and the room beside the query is {fit.room}; "
                "shorten it, or choose long_documents='windows' or 'truncate'."
            )

    def take_beginning(self, fit: Fit | None) -> None:
        """Leave the cut to the scorer, which cuts by tokens, and note where it is; None where nobody can tell."""
        self.texts = [self.document.text]
        self.located = fit is not None
        self.truncated = fit is not None and not fit.fits
        self.spans = [(0, len(self.document.text) if fit is None else fit.kept_chars)]

    def take_scores(self, scores: np.ndarray, failed: Mapping[int, Exception], aggregate: Aggregate) -> None:
        """Fold the scores of this item's windows; one failed window fails the document."""
        if self.error is None:
            self.error = next((failed[slot] for slot in self.slots if slot in failed), None)
        if self.error is None:
            self.log_odds, self.best = fold(scores[self.slots], aggregate)

    def ranked(self, rank: int, index: int, score: float) -> RankedDocument:
        """Return the item as part of a result."""
        return RankedDocument(
            document=self.document,
            score=score,
            log_odds=self.log_odds,
            rank=rank,
            index=index,
            first_stage_score=self.first_stage_score,
            truncated=self.truncated,
            windows=len(self.spans),
            best_window=self.spans[self.best] if self.located and self.error is None else None,
            error=self.error,
        )


@dataclass(slots=True)
class Job:
    """One query with its items and the distinct texts to be scored for them."""

    query: str
    instruction: str | None
    items: list[Item]
    texts: list[str] = field(default_factory=list)


def as_items(candidates: object) -> list[Item]:
    """Return one item for each candidate.

    Raises:
        InvalidInputError: If `candidates` is no list of strings, `Document`s and `Candidate`s.
    """
    if isinstance(candidates, str | bytes) or not isinstance(candidates, Sequence):
        raise InvalidInputError(
            f"candidates must be a list of strings, Documents or Candidates, not {type(candidates).__name__}."
        )
    return [_item(index, candidate) for index, candidate in enumerate(candidates)]


def _item(index: int, candidate: object) -> Item:
    match candidate:
        case Candidate(document, score, _):
            return Item(document, score)
        case Document():
            return Item(candidate, None)
        case str():
            return Item(Document.from_text(candidate), None)
        case _:
            raise InvalidInputError(
                f"candidates[{index}] must be a string, a Document or a Candidate, not {type(candidate).__name__}."
            )


def checked_scores(name: str, outcome: Outcome, n_texts: int) -> tuple[np.ndarray, dict[int, Exception]]:
    """Return float32 scores `(n_texts,)` and the error of every text without a finite one."""
    if isinstance(outcome, DocumentScoringError):
        given, failed = outcome.scores, dict(outcome.failed)
    else:
        given, failed = outcome, {}
    scores = np.asarray(given, dtype=np.float32)
    if scores.shape != (n_texts,):
        raise ScorerError(
            f"{name} returned scores of shape {scores.shape} for {n_texts} documents; "
            f"expected ({n_texts},), one score per document in input order."
        )
    for index in np.flatnonzero(~np.isfinite(scores)):
        failed.setdefault(int(index), NonFiniteScoreError(f"{name} gave {scores[index]} as a score."))
    return scores, failed
