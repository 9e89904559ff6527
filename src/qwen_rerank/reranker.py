"""The second stage: plan what is read of each candidate, score it, fold windows, order. No model in here."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

import numpy as np

from qwen_rerank.calibration import Calibration, Key, sigmoid
from qwen_rerank.checks import (
    check_choice,
    check_count,
    check_list,
    check_probability,
    check_query,
    check_text,
    kind_of,
    sift_texts,
)
from qwen_rerank.errors import (
    CalibrationMismatchError,
    DocumentScoringError,
    DocumentTooLongError,
    InvalidInputError,
)
from qwen_rerank.passages import Aggregate, Measure, Span, fold, quick, split
from qwen_rerank.protocols import Scorer, SimpleScorer
from qwen_rerank.scorers.adapted import as_scorer
from qwen_rerank.scorers.base import Arguments, BaseScorer, DocumentRow
from qwen_rerank.sharing import SharedCopies
from qwen_rerank.types import Candidate, Document, Fit, RankedDocument, Scores

logger = logging.getLogger(__name__)

Rankable = str | Document | Candidate
LongDocuments = Literal["truncate", "windows", "error"]
OnError = Literal["raise", "last"]

MAX_OVERLAP = 0.4  # above it a window that ends early at a sentence would hardly advance


@dataclass(frozen=True, slots=True, eq=False)
class Reranker(SharedCopies):
    """Orders candidates by relevance to a query.

    The order is by log-odds, always; equal scores keep the first stage's order, and a document that occurs twice gets
    the same score twice. Settings are fixed: `dataclasses.replace(reranker, threshold=0.5)` gives another reranker over
    the same scorer.

    Args:
        scorer: Gives the log-odds: a scorer, any object with `name` and `score(query, documents)`, or a name that
            `load_scorer` knows, which is loaded here.
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
        ModelError: If `scorer` is the name of a model that cannot be used.
    """

    scorer: Scorer | SimpleScorer | str
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
    _scorer: BaseScorer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("long_documents", self.long_documents, get_args(LongDocuments))
        check_choice("aggregate", self.aggregate, get_args(Aggregate))
        check_choice("on_error", self.on_error, get_args(OnError))
        if check_probability("window_overlap", self.window_overlap) > MAX_OVERLAP:
            raise InvalidInputError(f"window_overlap must be between 0 and {MAX_OVERLAP}, not {self.window_overlap!r}.")
        for name, count in (("top_n", self.top_n), ("window_tokens", self.window_tokens)):
            if count is not None:
                check_count(name, count)
        if self.threshold is not None:
            check_probability("threshold", self.threshold)
        if self.instruction is not None:
            check_text("instruction", self.instruction)
        object.__setattr__(self, "_scorer", as_scorer(self.scorer))
        if isinstance(self.scorer, str):
            object.__setattr__(self, "scorer", self._scorer)
        if self.calibration is not None:
            self.calibration.check(self.calibration_key())
        self._check_threshold()

    @property
    def name(self) -> str:
        """The scorer's name."""
        return self._scorer.name

    def calibration_key(self) -> Key:
        """Return all that a calibration of this reranker's scores depends on."""
        key: dict[str, str | float | None] = {
            "scorer": self._scorer.fingerprint,
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
        instruction = self._check_call(top_n, instruction)
        plan = self._plan(query, candidates, instruction)
        arguments = Arguments([plan.row], instruction)
        [scores] = self._scorer.run(arguments) if arguments.requests else arguments.spread([])
        return self._finish(plan, scores, top_n)

    async def arerank(
        self,
        query: str,
        candidates: Sequence[Rankable],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `rerank`, without blocking the event loop."""
        instruction = self._check_call(top_n, instruction)
        plan = await asyncio.to_thread(self._plan, query, candidates, instruction)
        arguments = Arguments([plan.row], instruction)
        [scores] = await self._scorer.arun(arguments) if arguments.requests else arguments.spread([])
        return self._finish(plan, scores, top_n)

    async def arerank_checked(self, query: str, documents: Sequence[Document]) -> list[RankedDocument]:
        """As `arerank`, for a caller that has checked query and texts."""
        items, texts = [_Item(document, None) for document in documents], [document.text for document in documents]
        if self.long_documents == "truncate":
            plan = _plan_whole(query, items, texts)
        else:
            plan = await asyncio.to_thread(self._plan_long, query, items, self.instruction)
        [scores] = await self._scorer.arun(Arguments([plan.row], self.instruction))
        return self._finish(plan, scores, None)

    def rerank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence[Rankable]],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[list[RankedDocument]]:
        """Return `rerank` of every query with its candidates, scored together; a failing document touches no other query.

        Raises:
            InvalidInputError: As `rerank`; or if there is not one list of candidates for each query.
            DocumentScoringError: As `rerank`, for the first query with a failed document.
        """
        instruction = self._check_call(top_n, instruction)
        asked, lists = check_list("queries", queries, of="strings"), check_list("candidates", candidates, of="lists")
        if len(asked) != len(lists):
            raise InvalidInputError(
                f"candidates has {len(lists)} lists for {len(asked)} queries; give one list for each query."
            )
        plans = [self._plan(query, found, instruction) for query, found in zip(asked, lists, strict=True)]
        arguments = Arguments([plan.row for plan in plans], instruction)
        results = self._scorer.run(arguments) if arguments.requests else arguments.spread([])
        return [self._finish(plan, scores, top_n) for plan, scores in zip(plans, results, strict=True)]

    def _check_call(self, top_n: int | None, instruction: str | None) -> str | None:
        """Check the settings of one call and return its instruction."""
        if top_n is not None:
            check_count("top_n", top_n)
        self._check_threshold()
        if instruction is None:
            return self.instruction
        if self.calibration is not None and check_text("instruction", instruction) != self.instruction:
            raise CalibrationMismatchError(
                f"this calibration was fitted for the instruction {self.instruction!r}, not for {instruction!r}; "
                "leave the instruction out, or use a reranker without this calibration."
            )
        return check_text("instruction", instruction)

    def _plan(self, query: object, candidates: object, instruction: str | None) -> _Plan:
        """Check one query's arguments and say what is read of each candidate."""
        text = check_query(query)
        items = [
            _item(index, candidate)
            for index, candidate in enumerate(
                check_list("candidates", candidates, of="strings, Documents or Candidates")
            )
        ]
        texts, bad = sift_texts("candidates", [item.document.text for item in items])
        if bad and self.on_error == "raise":
            raise bad[min(bad)]
        for index, error in bad.items():
            items[index].error = error
        if self.long_documents == "truncate":
            return _plan_whole(text, items, texts, bad)
        return self._plan_long(text, items, instruction)

    def _plan_long(self, query: str, items: list[_Item], instruction: str | None) -> _Plan:
        """Measure the candidates, and read them in windows or refuse those that do not fit."""
        readable = [item for item in items if item.error is None]
        texts = [item.document.text for item in readable]
        window_tokens = self.window_tokens if self.long_documents == "windows" else None
        measure = quick(self._measure(query, instruction), window_tokens=window_tokens)
        pieces: list[str] = []
        if self.long_documents == "windows" and readable:
            spans = split(texts, measure, overlap=self.window_overlap, window_tokens=window_tokens)
            for item, found in zip(readable, spans, strict=True):
                item.take_windows(found, self.aggregate, pieces)
        elif readable:
            for item, fit in zip(readable, measure(texts), strict=True):
                item.take_whole_or_fail(fit, pieces)
        return _Plan(items, DocumentRow(query, pieces))

    def _measure(self, query: str, instruction: str | None) -> Measure:
        return lambda texts: self._scorer.measure(query, texts, instruction)

    def _finish(self, plan: _Plan, scores: Scores, top_n: int | None) -> list[RankedDocument]:
        """Fold the windows' scores, order the documents, and apply threshold and top_n."""
        items = plan.items
        for item in items:
            item.take_scores(scores, self.aggregate)
        self._report_failures(items)
        log_odds = np.array([item.log_odds for item in items])
        probabilities = sigmoid(log_odds) if self.calibration is None else self.calibration.probability(log_odds)
        # Stable sort on the negated scores: equal scores keep their first-stage order, so a saturated scorer never does
        # worse than the ranking it was given. NaN, a document without a score, sorts last.
        order = np.argsort(-log_odds, kind="stable")
        if self.threshold is not None:
            self._check_threshold()
            order = order[~(probabilities[order] < self.threshold)]  # not below: a failed document is no "no"
        order = order[: self.top_n if top_n is None else top_n]
        return [
            items[index].ranked(rank, int(index), float(probabilities[index]))
            for rank, index in enumerate(order, start=1)
        ]

    def _report_failures(self, items: Sequence[_Item]) -> None:
        failures = {index: item.error for index, item in enumerate(items) if item.error is not None}
        if not failures:
            return
        error = DocumentScoringError(failures, np.array([item.log_odds for item in items], dtype=np.float32))
        if self.on_error == "raise":
            raise error
        logger.warning("%s They are placed last, without a score.", error)

    def _check_threshold(self) -> None:
        """Refuse a threshold on scores that are no probabilities.

        Checked again around every call, because a scorer may learn only from its server's answer what its scores are.
        """
        if self.threshold is not None and self.calibration is None and not self._scorer.calibrated:
            raise InvalidInputError(
                f"threshold ({self.threshold}) needs a probability, and the scores of {self.name} are none; "
                "fit a calibration and pass it as calibration=…, or leave the threshold out."
            )


@dataclass(slots=True)
class _Item:
    """One candidate on its way: what is read of it, and what came of it.

    Attributes:
        spans: What is read of the text; empty until the scorer has told where it cut.
        first: Place of its first text among those that are scored.
        last: Place after its last one.
    """

    document: Document
    first_stage_score: float | None
    spans: list[Span] = field(default_factory=list)
    first: int = 0
    last: int = 0
    located: bool = True
    truncated: bool = False
    error: Exception | None = None
    log_odds: float = math.nan
    best: int = 0

    def take_windows(self, spans: list[Span] | DocumentTooLongError, aggregate: Aggregate, pieces: list[str]) -> None:
        """Read the text in windows, as many as count."""
        if isinstance(spans, DocumentTooLongError):
            self.error = spans
            return
        self.spans = spans[:1] if aggregate == "first" else spans
        self.truncated = len(self.spans) < len(spans)
        self._read([self.document.text[start:end] for start, end in self.spans], pieces)

    def take_whole_or_fail(self, fit: Fit, pieces: list[str]) -> None:
        """Read the whole text, and nothing of a text that does not fit."""
        if fit.fits:
            self.spans = [(0, len(self.document.text))]
            self._read([self.document.text], pieces)
        else:
            self.error = DocumentTooLongError(
                f"the document has at least {fit.tokens} tokens and the room beside the query is {fit.room}; "
                "shorten it, or choose long_documents='windows' or 'truncate'."
            )

    def _read(self, texts: Sequence[str], pieces: list[str]) -> None:
        self.first, self.last = len(pieces), len(pieces) + len(texts)
        pieces.extend(texts)

    def take_scores(self, scores: Scores, aggregate: Aggregate) -> None:
        """Fold the scores of this item's windows; one failed window fails the document."""
        own = range(self.first, self.last)
        if self.error is None:
            self.error = next((scores.errors[place] for place in own if place in scores.errors), None)
        if not self.spans and self.first < self.last:
            kept, n_chars = int(scores.kept_chars[self.first]), len(self.document.text)
            self.located, self.truncated = kept >= 0, 0 <= kept < n_chars
            self.spans = [(0, kept if kept >= 0 else n_chars)]
        if self.error is None:
            self.log_odds, self.best = fold(scores.log_odds[self.first : self.last], aggregate)

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


@dataclass(frozen=True, slots=True)
class _Plan:
    """One query's candidates, and the texts that are scored for them."""

    items: list[_Item]
    row: DocumentRow


def _plan_whole(query: str, items: list[_Item], texts: list[str], bad: Mapping[int, Exception] | None = None) -> _Plan:
    """Read each text from its beginning: the scorer cuts by tokens and tells where, so nothing is measured before."""
    for index, item in enumerate(items):
        item.first, item.last = index, index + 1
    return _Plan(items, DocumentRow(query, texts, bad or {}))


def _item(index: int, candidate: object) -> _Item:
    match candidate:
        case Candidate(document, score, _):
            return _Item(document, score)
        case Document():
            return _Item(candidate, None)
        case str():
            return _Item(Document.from_text(candidate), None)
        case _:
            raise InvalidInputError(
                f"candidates[{index}] must be a string, a Document or a Candidate, not {kind_of(candidate)}."
            )
