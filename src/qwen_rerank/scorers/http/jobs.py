"""The queries of one call: their distinct texts, what became of them, and how they are cut into requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_rerank.checks import check_query, check_text, check_texts
from qwen_rerank.errors import DocumentScoringError
from qwen_rerank.scorers.http.batches import Batch, Unit
from qwen_rerank.scorers.http.details import ScoreDetails
from qwen_rerank.scorers.http.log_odds import to_log_odds
from qwen_rerank.scorers.http.session import Session
from qwen_rerank.threaded import check_pairs


@dataclass(slots=True)
class Job:
    """One query, its distinct texts, and what has come of them.

    Attributes:
        query: The query.
        instruction: Of this call, or None.
        places: Document to distinct text.
        texts: Distinct texts, so that equal documents score the same and are sent once.
        scores: float64 `(n_texts,)` as reported; NaN where there is none.
        truncated: bool `(n_texts,)`.
        failed: Text to the reason.
        prompt_tokens: As counted by the server, or None.
    """

    query: str
    instruction: str | None
    places: list[int]
    texts: list[str]
    scores: np.ndarray = field(init=False)
    truncated: np.ndarray = field(init=False)
    failed: dict[int, Exception] = field(default_factory=dict)
    prompt_tokens: int | None = 0

    def __post_init__(self) -> None:
        self.scores = np.full(len(self.texts), np.nan)
        self.truncated = np.zeros(len(self.texts), dtype=bool)

    def details(self, session: Session) -> ScoreDetails:
        """Return the scores of the documents.

        Raises:
            DocumentScoringError: If some have none.
        """
        kept = ~np.isnan(self.scores)
        log_odds = np.full(len(self.texts), np.nan, dtype=np.float32)
        saturated = np.zeros(len(self.texts), dtype=bool)
        log_odds[kept], saturated[kept] = to_log_odds(self.scores[kept], session.kind)
        failed = {i: self.failed[place] for i, place in enumerate(self.places) if place in self.failed}
        if failed:
            raise DocumentScoringError(failed, log_odds[self.places])
        return ScoreDetails(
            log_odds=log_odds[self.places],
            reported=self.scores[self.places],
            kind=session.kind,
            saturated=saturated[self.places],
            truncated=self.truncated[self.places],
            prompt_tokens=self.prompt_tokens,
            route=session.path,
        )


def make_job(query: str, documents: Sequence[str], instruction: str | None) -> Job:
    """Check the arguments of one query."""
    texts = check_texts("documents", documents)
    if instruction is not None:
        check_text("instruction", instruction)
    distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return Job(check_query(query), instruction, [distinct[text] for text in texts], list(distinct))


def make_jobs(queries: Sequence[str], documents: Sequence[Sequence[str]], instruction: str | None) -> list[Job]:
    """Check the arguments of several queries."""
    return [make_job(query, texts, instruction) for query, texts in zip(*check_pairs(queries, documents), strict=True)]


def chunks(units: list[Unit], size: int) -> list[Batch]:
    """Cut units into requests."""
    return [Batch(units[start : start + size]) for start in range(0, len(units), size)]


def no_details() -> ScoreDetails:
    """Return what no documents give."""
    none, flags = np.empty(0), np.empty(0, dtype=bool)
    return ScoreDetails(none.astype(np.float32), none, "logit", flags, flags, 0, "")
