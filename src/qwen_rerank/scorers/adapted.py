"""Scorers of other people: any object with a name and `score(query, documents)`, and models by their names."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen_rerank.checks import kind_of
from qwen_rerank.errors import DocumentScoringError, InvalidInputError, NonFiniteScoreError, ScorerError
from qwen_rerank.protocols import (
    AsyncScorer,
    BatchScorer,
    DetailedScorer,
    FingerprintedScorer,
    MeasuringScorer,
    ScaledScorer,
    SimpleScorer,
)
from qwen_rerank.scorers.base import Arguments, BaseScorer, ScoreRequest, unscored
from qwen_rerank.types import Fit, Scores


class AdaptedScorer(BaseScorer):
    """Any object with `name` and `score(query, documents)` as a `BaseScorer`; what else it has is used where it helps.

    Its answers are checked: one finite score a document, in input order.

    Args:
        scorer: The object.
    """

    def __init__(self, scorer: SimpleScorer) -> None:
        self._scorer = scorer
        self.takes_instruction = _accepts_instruction(scorer)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The scorer's own."""
        return str(self._scorer.name)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The scorer's own; without one its class and name, which is all that is known of it."""
        if isinstance(self._scorer, FingerprintedScorer):
            return self._scorer.fingerprint
        kind = type(self._scorer)
        return f"{kind.__module__}.{kind.__qualname__}:{self.name}"

    @property
    def calibrated(self) -> bool:
        """The scorer's own word; True where it has none."""
        return self._scorer.calibrated if isinstance(self._scorer, ScaledScorer) else True

    def _compute(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        scorer = self._scorer
        if len(requests) == 1 or isinstance(scorer, DetailedScorer) or not isinstance(scorer, BatchScorer):
            return [self._one(request) for request in requests]
        queries, texts = [request.query for request in requests], [request.texts for request in requests]
        try:
            found = scorer.score_many(queries, texts, **self._options(requests[0].instruction))
        except DocumentScoringError:  # it does not say whose document failed: each query by itself does
            return [self._one(request) for request in requests]
        if len(found) != len(requests):
            raise ScorerError(f"{self.name} returned {len(found)} arrays for {len(requests)} queries.")
        return [self._read(request, given) for request, given in zip(requests, found, strict=True)]

    def _one(self, request: ScoreRequest) -> Scores:
        options = self._options(request.instruction)
        if isinstance(self._scorer, DetailedScorer):
            return self._read(request, self._scorer.score_details(request.query, request.texts, **options))
        try:
            return self._read(request, self._scorer.score(request.query, request.texts, **options))
        except DocumentScoringError as exc:
            return self._read(request, exc)

    async def arun(self, arguments: Arguments) -> list[Scores]:
        """As `run`, on the scorer's own coroutine where it has one."""
        scorer = self._scorer
        if not isinstance(scorer, AsyncScorer) or isinstance(scorer, DetailedScorer):
            return await super().arun(arguments)
        found = []
        for request in self._call(arguments).requests:
            given: np.ndarray | DocumentScoringError
            try:
                given = await scorer.ascore(request.query, request.texts, **self._options(request.instruction))
            except DocumentScoringError as exc:
                given = exc
            found.append(await asyncio.to_thread(self._read, request, given))
        return arguments.spread(found)

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        if not isinstance(self._scorer, MeasuringScorer):
            return super()._measure(query, texts, instruction)
        return self._scorer.fit(query, texts, **self._options(instruction))

    def _options(self, instruction: str | None) -> dict[str, Any]:
        return {"instruction": instruction} if self.takes_instruction else {}

    def _read(self, request: ScoreRequest, given: np.ndarray | DocumentScoringError | Scores) -> Scores:
        """Return what the scorer gave as `Scores`, checked; an array says nothing of tokens, and `fit` of what was kept.

        Raises:
            ScorerError: If there is not one score a document.
        """
        n = len(request.texts)
        if isinstance(given, DocumentScoringError):
            found = replace(unscored(n, given.failed), log_odds=given.scores)
        elif isinstance(given, Scores):
            found = given
        else:
            found = replace(unscored(n, {}), log_odds=given)
        try:
            log_odds = np.asarray(found.log_odds, dtype=np.float32)
        except (ValueError, TypeError, RuntimeError) as exc:
            raise ScorerError(
                f"{self.name} returned {kind_of(given)}, of which no array of numbers can be made ({exc}); return one "
                "score per document in input order."
            ) from exc
        for array in (log_odds, found.tokens, found.kept_chars):
            if np.shape(array) != (n,):
                raise ScorerError(
                    f"{self.name} returned scores of shape {np.shape(array)} for {n} documents; "
                    f"expected ({n},), one score per document in input order."
                )
        errors = dict(found.errors)
        for index in np.flatnonzero(~np.isfinite(log_odds)).tolist():
            errors.setdefault(index, NonFiniteScoreError(f"{self.name} gave {log_odds[index]} as a score."))
        return Scores(log_odds, found.tokens, self._kept(request, found), errors)

    def _kept(self, request: ScoreRequest, found: Scores) -> np.ndarray:
        if isinstance(self._scorer, DetailedScorer) or not isinstance(self._scorer, MeasuringScorer):
            return found.kept_chars
        try:
            fits = self._measure(request.query, request.texts, request.instruction)
        except InvalidInputError:  # a scorer with the method and without a tokenizer
            return found.kept_chars
        return np.array([fit.kept_chars for fit in fits], dtype=np.int32)


class _OwnScore:
    """A subclass of ours whose own `score` says something else: it is taken at its word, and at nothing made from it."""

    def __init__(self, scorer: BaseScorer) -> None:
        self.name = scorer.name
        self.fingerprint = f"{type(scorer).__qualname__}:{scorer.fingerprint}"
        self.score = scorer.score
        self.fit = scorer.fit
        self._scorer = scorer

    @property
    def calibrated(self) -> bool:
        return self._scorer.calibrated


def as_scorer(scorer: object) -> BaseScorer:
    """Return any scorer, or a model's name or server's address, as a `BaseScorer`.

    Raises:
        InvalidInputError: If it is neither a name nor an object with `name` and `score(query, documents)`.
        ModelError: If the name is that of a model which cannot be used.
    """
    if isinstance(scorer, str):
        from qwen_rerank.scorers.loading import load_scorer

        scorer = load_scorer(scorer)
    if isinstance(scorer, BaseScorer):
        return scorer if type(scorer).score is BaseScorer.score else AdaptedScorer(_OwnScore(scorer))
    if isinstance(scorer, SimpleScorer) and not isinstance(scorer, type):
        return AdaptedScorer(scorer)
    raise InvalidInputError(
        f"scorer must be a model's name or have `name` and `score(query, documents)`, not be {scorer!r:.80}."
    )


def _accepts_instruction(scorer: SimpleScorer) -> bool:
    try:
        parameters = inspect.signature(scorer.score).parameters.values()
    except (TypeError, ValueError):  # something callable that does not say what it takes
        return True
    return any(p.name == "instruction" or p.kind is p.VAR_KEYWORD for p in parameters)
