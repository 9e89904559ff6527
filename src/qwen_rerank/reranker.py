"""The second stage: candidates → scores → one order. No model in here, only what every scorer needs around it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np

from qwen_rerank.calibration import Calibration, Key, sigmoid
from qwen_rerank.checks import check_choice, check_count, check_probability, check_query, check_text, check_texts
from qwen_rerank.errors import (
    CalibrationMismatchError,
    DocumentScoringError,
    InvalidInputError,
    InvalidTextError,
    QueryTooLongError,
    ScorerError,
)
from qwen_rerank.items import Job, Outcome, Rankable, as_items, checked_scores
from qwen_rerank.passages import Aggregate, Measure, quick, split
from qwen_rerank.protocols import Scorer
from qwen_rerank.types import Fit, RankedDocument

logger = logging.getLogger(__name__)

LongDocuments = Literal["truncate", "windows", "error"]
OnError = Literal["raise", "last"]

_NO_SCORES = np.empty(0, dtype=np.float32)

MAX_OVERLAP = 0.4  # above it a window that ends early at a sentence would hardly advance


@dataclass(frozen=True, slots=True, eq=False)
class Reranker:
    """Orders candidates by relevance to a query.

    The order is by log-odds, always; equal scores keep the first stage's order, and a document that occurs twice gets
    the same score twice. Settings are fixed: `dataclasses.replace(reranker, threshold=0.5)` gives another reranker over
    the same scorer.

    Args:
        scorer: Gives the log-odds.
        top_n: Longest result; None for all.
        threshold: Least probability of a result, calibrated where `calibration` is given, else `sigmoid(log_odds)`.
            None keeps all. A document that could not be scored is not dropped by it.
        calibration: Turns log-odds into probabilities. It never changes the order.
        long_documents: What happens to a document longer than its room. "truncate": its end is cut. "windows":
            overlapping windows are scored. "error": the document fails with `DocumentTooLongError`.
        aggregate: How window scores become one: "max", "mean", "topk-mean" (of the three highest), or "first" (only the
            first window is scored, and the document counts as truncated).
        window_tokens: Longest window; None for the whole room beside the query.
        window_overlap: Share of a window that its successor repeats, 0 to 0.4.
        on_error: When a document cannot be scored: "raise" a `DocumentScoringError`, or put it "last" with score NaN
            and its `error` set, after everything that has a score.
        instruction: What relevance means here; None for the scorer's own default.

    Raises:
        InvalidInputError: If a setting is wrong, or the scorer's scores are no probabilities and `threshold` is given
            without a calibration; `CalibrationMismatchError` if the calibration was fitted for other settings.
    """

    scorer: Scorer
    _: KW_ONLY
    top_n: int | None = None
    threshold: float | None = None
    calibration: Calibration | None = None
    long_documents: LongDocuments = "truncate"
    aggregate: Aggregate = "max"
    window_tokens: int | None = None
    window_overlap: float = 0.1
    on_error: OnError = "raise"
    instruction: str | None = None

    def __post_init__(self) -> None:
        check_choice("long_documents", self.long_documents, get_args(LongDocuments))
        check_choice("aggregate", self.aggregate, get_args(Aggregate))
        check_choice("on_error", self.on_error, get_args(OnError))
        if check_probability("window_overlap", self.window_overlap) > MAX_OVERLAP:
            raise InvalidInputError(f"window_overlap must be between 0 and {MAX_OVERLAP}, not {self.window_overlap!r}.")
        for name in ("top_n", "window_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.threshold is not None:
            check_probability("threshold", self.threshold)
        if self.instruction is not None:
            check_text("instruction", self.instruction)
        if self.calibration is not None:
            self.calibration.check(self.calibration_key())
        self._check_threshold()

    def calibration_key(self) -> Key:
        """Return all that a calibration of this reranker's scores depends on."""
        key: dict[str, str | float | None] = {
            "scorer": self.scorer.fingerprint,
            "instruction": self.instruction,
            "long_documents": self.long_documents,
        }
        if self.long_documents == "windows":
            key |= {
                "aggregate": self.aggregate,
                "window_tokens": self.window_tokens,
                "window_overlap": self.window_overlap,
            }
        return key

    def rerank(
        self,
        query: str,
        candidates: Sequence[Rankable],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the candidates, most relevant first.

        Args:
            query: What is searched for.
            candidates: Strings, `Document`s and `Candidate`s in the first stage's order; an empty list gives an empty
                result without touching the scorer.
            top_n: Longest result of this call; None for the reranker's own.
            instruction: What relevance means in this call; None for the reranker's own.

        Raises:
            InvalidInputError: If an argument is wrong; `QueryTooLongError` when the query leaves no room.
            DocumentScoringError: If a document could not be scored and `on_error` is "raise"; its indices are places
                in `candidates`.
        """
        job = self._prepare(query, candidates, top_n, instruction)
        return self._finish(job, self._score(job), top_n)

    async def arerank(
        self,
        query: str,
        candidates: Sequence[Rankable],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `rerank`, without blocking the event loop."""
        job = await asyncio.to_thread(self._prepare, query, candidates, top_n, instruction)
        return self._finish(job, await self._ascore(job), top_n)

    def rerank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence[Rankable]],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[list[RankedDocument]]:
        """Return `rerank` of every query with its candidates, scored together.

        A failing document makes every query be scored again by itself, so that only its own query is touched.

        Raises:
            InvalidInputError: As `rerank`; or if there is not one list of candidates for each query.
            DocumentScoringError: As `rerank`, for the first query with a failed document.
        """
        texts = check_texts("queries", queries)
        if isinstance(candidates, str | bytes) or not isinstance(candidates, Sequence):
            raise InvalidInputError(f"candidates must be a list of lists, not {type(candidates).__name__}.")
        if len(texts) != len(candidates):
            raise InvalidInputError(
                f"candidates has {len(candidates)} lists for {len(texts)} queries; give one list for each query."
            )
        jobs = [self._prepare(query, found, top_n, instruction) for query, found in zip(texts, candidates, strict=True)]
        outcomes = self._score_many(jobs)
        return [self._finish(job, outcome, top_n) for job, outcome in zip(jobs, outcomes, strict=True)]

    def _prepare(self, query: str, candidates: Sequence[Rankable], top_n: int | None, instruction: str | None) -> Job:
        """Check one call's arguments, cut long documents, and collect the distinct texts to score."""
        check_query(query)
        if top_n is not None:
            check_count("top_n", top_n)
        if instruction is not None:
            check_text("instruction", instruction)
            self._check_instruction(instruction)
        self._check_threshold()
        job = Job(query, self.instruction if instruction is None else instruction, as_items(candidates))
        self._check_texts(job)
        self._fit(job)
        places: dict[str, int] = {}
        for item in job.items:
            if item.error is None:
                item.slots = [places.setdefault(text, len(places)) for text in item.texts]
        job.texts = list(places)
        return job

    def _check_texts(self, job: Job) -> None:
        """Refuse a text that is none, or mark its document as failed."""
        for index, item in enumerate(job.items):
            try:
                check_text(f"candidates[{index}]", item.document.text)
            except InvalidTextError as exc:
                if self.on_error == "raise":
                    raise
                item.error = exc

    def _fit(self, job: Job) -> None:
        """Say for every item which spans of its text are scored."""
        items = [item for item in job.items if item.error is None]
        texts = [item.document.text for item in items]
        if not items:
            return
        window_tokens = self.window_tokens if self.long_documents == "windows" else None
        measure = quick(partial(self.scorer.fit, job.query, instruction=job.instruction), window_tokens=window_tokens)
        if self.long_documents == "windows":
            for item, spans in zip(
                items, split(texts, measure, overlap=self.window_overlap, window_tokens=window_tokens), strict=True
            ):
                item.take_windows(spans, self.aggregate)
        elif self.long_documents == "error":
            for item, fit in zip(items, measure(texts), strict=True):
                item.take_whole_or_fail(fit)
        else:
            for item, known in zip(items, _fits_if_known(measure, texts), strict=True):
                item.take_beginning(known)

    def _score(self, job: Job) -> Outcome:
        if not job.texts:
            return _NO_SCORES
        try:
            return self.scorer.score(job.query, job.texts, instruction=job.instruction)
        except DocumentScoringError as exc:
            return exc

    async def _ascore(self, job: Job) -> Outcome:
        if not job.texts:
            return _NO_SCORES
        try:
            return await self.scorer.ascore(job.query, job.texts, instruction=job.instruction)
        except DocumentScoringError as exc:
            return exc

    def _score_many(self, jobs: Sequence[Job]) -> Iterable[Outcome]:
        """Score all jobs together; after a failure each by itself, so that it is known which query it belongs to."""
        busy = [job for job in jobs if job.texts]
        if not busy:
            return [_NO_SCORES for _ in jobs]
        try:
            scores = self.scorer.score_many(
                [job.query for job in busy], [job.texts for job in busy], instruction=busy[0].instruction
            )
        except DocumentScoringError:
            return (self._score(job) for job in jobs)
        if len(scores) != len(busy):
            raise ScorerError(f"{self.scorer.name} returned {len(scores)} arrays for {len(busy)} queries.")
        outcomes = iter(scores)
        return [next(outcomes) if job.texts else _NO_SCORES for job in jobs]

    def _finish(self, job: Job, outcome: Outcome, top_n: int | None) -> list[RankedDocument]:
        """Fold the windows' scores, order the documents, and apply threshold and top_n."""
        scores, failed = checked_scores(self.scorer.name, outcome, len(job.texts))
        for item in job.items:
            item.take_scores(scores, failed, self.aggregate)
        self._report_failures(job)
        log_odds = np.array([item.log_odds for item in job.items])
        probabilities = sigmoid(log_odds) if self.calibration is None else self.calibration.probability(log_odds)
        # Stable sort on the negated scores: equal scores keep their first-stage order, so a saturated scorer never does
        # worse than the ranking it was given. NaN, a document without a score, sorts last.
        order = np.argsort(-log_odds, kind="stable")
        if self.threshold is not None:
            self._check_threshold()
            order = order[~(probabilities[order] < self.threshold)]  # not below: a failed document is no "no"
        order = order[: self.top_n if top_n is None else top_n]
        return [
            job.items[index].ranked(rank, int(index), float(probabilities[index]))
            for rank, index in enumerate(order, start=1)
        ]

    def _report_failures(self, job: Job) -> None:
        failures = {index: item.error for index, item in enumerate(job.items) if item.error is not None}
        if not failures:
            return
        error = DocumentScoringError(failures, np.array([item.log_odds for item in job.items], dtype=np.float32))
        if self.on_error == "raise":
            raise error
        logger.warning("%s They are placed last, without a score.", error)

    def _check_threshold(self) -> None:
        """Refuse a threshold on scores that are no probabilities.

        Checked again around every call, because a scorer may learn only from its server's answer what its scores are.
        """
        if self.threshold is not None and self.calibration is None and not getattr(self.scorer, "calibrated", True):
            raise InvalidInputError(
                f"threshold ({self.threshold}) needs a probability, and the scores of {self.scorer.name} are none; "
                "fit a calibration and pass it as calibration=…, or leave the threshold out."
            )

    def _check_instruction(self, instruction: str) -> None:
        """Refuse an instruction that the calibration was not fitted for."""
        if self.calibration is not None and instruction != self.instruction:
            raise CalibrationMismatchError(
                f"this calibration was fitted for the instruction {self.instruction!r}, not for {instruction!r}; "
                "leave the instruction out, or use a reranker without this calibration."
            )


def _fits_if_known(measure: Measure, texts: Sequence[str]) -> Sequence[Fit | None]:
    """Return how the texts fit; None where the scorer has no tokenizer to tell."""
    try:
        return measure(texts)
    except QueryTooLongError:
        raise
    except InvalidInputError:
        return [None] * len(texts)
