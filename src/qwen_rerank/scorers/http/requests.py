"""The requests of one call: made from its texts, sent, split where one is too large, and their answers checked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from qwen_rerank.errors import BackendRejectedError, InvalidInputError, ProtocolError, RerankError, RerankTimeoutError
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.base import ScoreRequest
from qwen_rerank.scorers.http.answers import (
    HttpAnswer,
    ParsedAnswer,
    ScoreKind,
    raise_protocol_error,
    to_log_odds,
)
from qwen_rerank.scorers.http.session import Session
from qwen_rerank.scorers.http.settings import HttpConfig
from qwen_rerank.scorers.http.transport import Transport
from qwen_rerank.types import Scores

_LIMIT = re.compile(r"batch size \d+ > maximum allowed batch size (\d+)")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ServerScores(Scores):
    """Scores with what the server said of them.

    Attributes:
        reported: float64 `(n_documents,)`, the numbers that the server sent; NaN where a document failed.
        saturated: bool `(n_documents,)`, where a probability so close to 0 or 1 came that its log-odds were clipped at
            ±20.
        kind: What those numbers are.
        prompt_tokens: Tokens that the server counted for all documents, or None.
        route: The path that was asked.
    """

    reported: np.ndarray
    saturated: np.ndarray
    kind: ScoreKind
    prompt_tokens: int | None
    route: str

    def take(self, places: np.ndarray) -> Self:
        """As `Scores.take`."""
        absent = places < 0
        return replace(
            Scores.take(self, places),
            reported=np.where(absent, np.nan, self.reported[places]),
            saturated=~absent & self.saturated[places],
        )


@dataclass(slots=True, eq=False)
class QueryTexts:
    """The texts of one query and what has come of them, text by text.

    Attributes:
        query: What is searched for.
        texts: The texts.
        instruction: Of this call, else the configured one.
        reported: float64 `(n_texts,)`; NaN where there is no answer.
        tokens: int32 `(n_texts,)`, of each prompt; -1 where the server makes it.
        kept_chars: int32 `(n_texts,)`; -1 where nobody can tell.
        errors: Place of each text that failed to the reason.
        prompt_tokens: As counted by the server so far; None once it did not count.
    """

    query: str
    texts: list[str]
    instruction: str | None
    reported: np.ndarray = field(init=False)
    tokens: np.ndarray = field(init=False)
    kept_chars: np.ndarray = field(init=False)
    errors: dict[int, Exception] = field(default_factory=dict)
    prompt_tokens: int | None = 0

    def __post_init__(self) -> None:
        self.reported = np.full(len(self.texts), np.nan)
        self.tokens = np.full(len(self.texts), -1, dtype=np.int32)
        self.kept_chars = self.tokens.copy()

    def scores(self, session: Session) -> ServerScores:
        """Return what has come of the texts."""
        scored = ~np.isnan(self.reported)
        log_odds = np.full(len(self.texts), np.nan, dtype=np.float32)
        saturated = np.zeros(len(self.texts), dtype=bool)
        log_odds[scored], saturated[scored] = to_log_odds(self.reported[scored], session.kind)
        return ServerScores(
            log_odds, self.tokens, self.kept_chars, dict(sorted(self.errors.items())), reported=self.reported,
            saturated=saturated, kind=session.kind, prompt_tokens=self.prompt_tokens, route=session.path,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SentText:
    """One text of one query, as it is sent: the ids of its whole prompt, or the text."""

    of: QueryTexts
    place: int
    text: str = ""
    ids: list[int] | None = None


@dataclass(slots=True)
class RequestSender:
    """Scores the texts of one call.

    Attributes:
        transport: Sends.
        session: What is known of the server.
        config: What the user asked for.
        warn: Says something once.
        deadline: Time of the loop's clock for all requests, or None for `config.timeout_s` each.
    """

    transport: Transport
    session: Session
    config: HttpConfig
    warn: Callable[[str], None]
    deadline: float | None

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ServerScores]:
        """Return what came of every query's texts; a failed request fails its own texts.

        Raises:
            InvalidInputError: If the server cannot carry the instruction.
            RerankServerError: If all requests failed: the first reason that is no timeout.
        """
        default = self.config.instruction
        queries = [QueryTexts(r.query, r.texts, default if r.instruction is None else r.instruction) for r in requests]
        if self.session.route is None:
            for query in queries:
                self.session.dialect.check(model=self.config.model, instruction=query.instruction)
        batches = await asyncio.to_thread(self._batches, queries)  # tokenizing would hold the loop up
        answers = await asyncio.gather(*(self._send(batch) for batch in batches), return_exceptions=True)
        for batch, answer in zip(batches, answers, strict=True):
            self._collect(batch, answer)
        if len(queries) > 1:
            for query in queries:  # prompts of several queries share requests
                query.prompt_tokens = None
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors and len(errors) == len(answers):
            # A timeout says less than what went wrong before it.
            raise next((e for e in errors if not isinstance(e, RerankTimeoutError)), errors[0])
        return [query.scores(self.session) for query in queries]

    # --- from texts to requests ----------------------------------------------------------------------------------

    def _batches(self, queries: Sequence[QueryTexts]) -> list[list[SentText]]:
        """Cut all work into requests; prompts of several queries may share one, texts of several cannot."""
        session, size = self.session, self.session.max_batch
        if session.route is not None and session.encoder is not None:
            return _chunks([piece for query in queries for piece in _prompts(session.encoder, query)], size)
        return [batch for query in queries for batch in _chunks(self._texts(query), size)]

    def _texts(self, query: QueryTexts) -> list[SentText]:
        dialect, texts = self.session.dialect, query.texts
        if self.session.encoder is not None:
            fits = self.session.encoder.fit_checked(query.query, texts, query.instruction)
            query.kept_chars[:] = [fit.kept_chars for fit in fits]
            texts = [text[: fit.kept_chars] for text, fit in zip(texts, fits, strict=True)]
        pieces = []
        for place, text in enumerate(texts):
            if text.strip() or dialect.scores_blank:
                pieces.append(SentText(query, place, text))
            else:
                query.errors[place] = InvalidInputError(
                    f"a {dialect.name} server refuses a request with an empty document; leave it out, or give "
                    "tokenizer= so that prompts are sent as token ids."
                )
        return pieces

    # --- one request ---------------------------------------------------------------------------------------------

    async def _send(self, batch: list[SentText]) -> ParsedAnswer:
        """Return the scores of a batch, in its order; in several requests where it is too large for one."""
        if len(batch) > self.session.max_batch:
            return await self._send_in_parts(batch, self.session.max_batch)
        deadline = self.deadline
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + self.config.timeout_s
        query = batch[0].of
        request = self.session.request(
            query.query,
            [text.text for text in batch],
            instruction=query.instruction,
            prompts=[text.ids for text in batch if text.ids is not None],
        )
        try:
            answer, parsed = await self.session.ask(self.transport, request, deadline=deadline)
        except BackendRejectedError as exc:
            limit = _lower_limit(exc, len(batch))
            if limit is None:
                raise
            self.session.max_batch = min(self.session.max_batch, limit)
            return await self._send_in_parts(batch, limit)
        self._check(answer, parsed, batch)
        return parsed

    async def _send_in_parts(self, batch: list[SentText], size: int) -> ParsedAnswer:
        answers = await asyncio.gather(*(self._send(part) for part in _chunks(batch, size)), return_exceptions=True)
        parts = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            parts.append(answer)
        counts = [part.prompt_tokens for part in parts if part.prompt_tokens is not None]
        return ParsedAnswer(
            np.concatenate([part.scores for part in parts]),
            sum(counts) if len(counts) == len(parts) else None,
        )

    def _check(self, answer: HttpAnswer, parsed: ParsedAnswer, batch: list[SentText]) -> None:
        """Refuse scores of other prompts or texts than were sent, of another model, or on another scale."""
        if self.session.route is not None:
            sent = sum(len(text.ids or ()) for text in batch)
            if parsed.prompt_tokens not in (None, sent):
                raise_protocol_error(answer, f"scores of {parsed.prompt_tokens} tokens where {sent} were sent")
        changed = [place for place, echo in parsed.echoes.items() if echo != batch[place].text]
        if changed:
            self._report_mismatch(answer, f"the text of document {changed[0]} changed")
        scores = parsed.scores
        if self.session.kind in ("probability", "relevance") and not np.all((scores >= 0) & (scores <= 1)):
            raise_protocol_error(
                answer, "scores outside 0 to 1 where probabilities are expected (scores='logit' takes them as logits)"
            )
        asked = self.config.model
        if asked is not None and parsed.model is not None and parsed.model != asked:
            self._report_mismatch(
                answer, f"scores of the model {answer.shown(parsed.model, 80)!r} where {asked!r} was asked for"
            )

    def _report_mismatch(self, answer: HttpAnswer, what: str) -> None:
        if self.config.strict_echo:
            raise ProtocolError(f"{answer.url} answered with {what}.", url=answer.url, status=answer.status)
        self.warn(f"{answer.url} answered with {what}; strict_echo=True makes this an error.")

    def _collect(self, batch: list[SentText], answer: ParsedAnswer | BaseException) -> None:
        """Take what came of one request to its texts."""
        if isinstance(answer, BaseException):
            if not isinstance(answer, RerankError):
                raise answer
            for piece in batch:
                piece.of.errors[piece.place] = answer
            return
        for piece, score in zip(batch, answer.scores, strict=True):
            piece.of.reported[piece.place] = score
        query = batch[0].of
        counts = (query.prompt_tokens, answer.prompt_tokens)
        query.prompt_tokens = None if counts[0] is None or counts[1] is None else counts[0] + counts[1]


def _prompts(encoder: PromptEncoder, query: QueryTexts) -> list[SentText]:
    prompts = encoder.encode_checked(query.query, query.texts, query.instruction)
    query.tokens[:] = [len(prompt.ids) for prompt in prompts]
    query.kept_chars[:] = [prompt.kept_chars for prompt in prompts]
    return [SentText(query, place, ids=prompt.ids.tolist()) for place, prompt in enumerate(prompts)]


def _chunks(pieces: list[SentText], size: int) -> list[list[SentText]]:
    return [pieces[start : start + size] for start in range(0, len(pieces), size)]


def _lower_limit(exc: BackendRejectedError, n: int) -> int | None:
    """Return how many documents to send at once after a refusal, or None if it is not about the number of documents."""
    told = _LIMIT.search(str(exc))
    too_large = exc.status == 413 or (exc.status in (400, 422) and "batch" in str(exc).lower())
    if n == 1 or not too_large:
        return None
    limit = int(told.group(1)) if told else n // 2
    return max(1, min(limit, n // 2 if limit >= n else limit))
