"""The requests of one call: made from its texts, sent, split where one is too large, and their answers checked."""

from __future__ import annotations

import asyncio
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
from qwen_rerank.scorers.http.limits import (
    Limit,
    chars_within,
    estimated_tokens,
    may_be_one_document,
    shorter_text,
    stated_limit,
)
from qwen_rerank.scorers.http.session import Session
from qwen_rerank.scorers.http.settings import HttpConfig
from qwen_rerank.scorers.http.transport import Transport
from qwen_rerank.types import Scores

TEMPLATE_TOKENS = 16  # that a server puts around the texts, where nobody can count them


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

    @property
    def beside(self) -> str:
        """Instruction and query, which stand in a prompt beside the document."""
        return f"{self.instruction or ''}\n{self.query}"

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


@dataclass(frozen=True, slots=True, eq=False)
class SentText:
    """One text of one query, as it is sent: the ids of its whole prompt, or the text.

    Attributes:
        of: The texts of its query.
        place: Among them.
        text: What is sent, if not ids.
        ids: Of its whole prompt, if they are sent.
        cut_for: Tokens that the prompt was cut to, or None where it was not measured.
        cuts: How often it was cut by an estimate since the server refused it.
    """

    of: QueryTexts
    place: int
    text: str = ""
    ids: list[int] | None = None
    cut_for: int | None = None
    cuts: int = 0

    @property
    def failed(self) -> bool:
        """Whether a request with this text has failed."""
        return self.place in self.of.errors


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
        """Return what came of every query's texts; a document that the server refuses fails alone.

        Raises:
            InvalidInputError: If the server cannot carry the instruction.
            RerankServerError: If nothing that was sent could be scored: the first reason that is no timeout.
        """
        default = self.config.instruction
        queries = [QueryTexts(r.query, r.texts, default if r.instruction is None else r.instruction) for r in requests]
        if self.session.route is None:
            for query in queries:
                self.session.dialect.check(model=self.config.model, instruction=query.instruction)
        batches = await asyncio.to_thread(self._batches, queries)  # tokenizing would hold the loop up
        await self._send_all(batches)
        if len(queries) > 1:
            for query in queries:  # prompts of several queries share requests
                query.prompt_tokens = None
        errors = [piece.of.errors.get(piece.place) for batch in batches for piece in batch]
        if (failed := [error for error in errors if error is not None]) and len(failed) == len(errors):
            # A timeout says less than what went wrong before it.
            raise next((e for e in failed if not isinstance(e, RerankTimeoutError)), failed[0])
        return [query.scores(self.session) for query in queries]

    # --- from texts to requests ----------------------------------------------------------------------------------

    def _batches(self, queries: Sequence[QueryTexts]) -> list[list[SentText]]:
        """Cut all work into requests; prompts of several queries may share one, texts of several cannot."""
        session, size = self.session, self.session.max_batch
        if session.route is not None and session.encoder is not None:
            pieces = [p for query in queries for p in _prompts(session.encoder, query, range(len(query.texts)))]
            return _chunks(pieces, size)
        return [batch for query in queries for batch in _chunks(self._texts(query, range(len(query.texts))), size)]

    def _texts(self, query: QueryTexts, places: Sequence[int]) -> list[SentText]:
        dialect, encoder = self.session.dialect, self.session.encoder
        texts = [query.texts[place] for place in places]
        if encoder is not None:
            fits = encoder.fit_checked(query.query, texts, query.instruction)
            query.kept_chars[list(places)] = [fit.kept_chars for fit in fits]
            texts = [text[: fit.kept_chars] for text, fit in zip(texts, fits, strict=True)]
        elif (room := self.session.learnt_room) is not None:
            room -= estimated_tokens(query.beside, room)
            for i, place in enumerate(places):
                if (kept := chars_within(texts[i], room)) < len(texts[i]):
                    texts[i], query.kept_chars[place] = texts[i][:kept], kept
        pieces = []
        for place, text in zip(places, texts, strict=True):
            if text.strip() or dialect.scores_blank:
                pieces.append(SentText(query, place, text, cut_for=None if encoder is None else encoder.max_length))
            else:
                query.errors[place] = InvalidInputError(
                    f"a {dialect.name} server refuses a request with an empty document; leave it out, or give "
                    "tokenizer= so that prompts are sent as token ids."
                )
        return pieces

    # --- one request ---------------------------------------------------------------------------------------------

    async def _send_all(self, batches: Sequence[list[SentText]]) -> None:
        ends = await asyncio.gather(*(self._send(batch) for batch in batches), return_exceptions=True)
        for end in ends:
            if end is not None:
                raise end

    async def _send(self, batch: list[SentText], *, known_fault: bool = False) -> None:
        """Score a batch, in several requests where it is too large for one; what fails is noted at its texts.

        Args:
            batch: Of one query, if texts are sent.
            known_fault: Whether single documents are already known to be at fault.
        """
        if len(batch) > self.session.max_batch:
            return await self._send_all(_chunks(batch, self.session.max_batch))
        try:
            answer, parsed = await self._ask(batch)
            self._check(answer, parsed, batch)
        except BackendRejectedError as exc:
            await self._after_refusal(batch, exc, known_fault=known_fault)
        except RerankError as exc:
            _fail(batch, exc)
        else:
            self._collect(batch, parsed)

    async def _ask(self, batch: list[SentText]) -> tuple[HttpAnswer, ParsedAnswer]:
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
        return await self.session.ask(self.transport, request, deadline=deadline)

    async def _after_refusal(self, batch: list[SentText], exc: BackendRejectedError, *, known_fault: bool) -> None:
        """Send fewer or shorter documents, as the refusal asks, until those at fault are alone."""
        if not may_be_one_document(exc):
            return _fail(batch, exc)
        limit = stated_limit(str(exc))
        # 1. Too many documents at once: the limit is kept for all later requests.
        if len(batch) > 1 and (_is_of(limit, "documents") or _is_evenly_too_large(exc, limit, batch)):
            told = limit.number if limit is not None and limit.number is not None else len(batch)
            most = told if told < len(batch) else len(batch) // 2
            self.session.max_batch = min(self.session.max_batch, most)
            return await self._send_all(_chunks(batch, most))
        # 2. A prompt is too long: cut again to the limit that was told, which is kept, or alone by an estimate.
        if limit is not None and limit.of == "tokens":
            if limit.number is not None:
                self.session.learn_length(limit.number)
            if (again := await asyncio.to_thread(self._cut_again, batch)) is not None:
                return await self._send(again, known_fault=True)
            if len(batch) == 1 and (shorter := self._shorter(batch[0])) is not None:
                await self._send([shorter], known_fault=True)
                if not shorter.failed and shorter.cut_for is not None:
                    self.session.learnt_room = min(self.session.learnt_room or shorter.cut_for, shorter.cut_for)
                return None
        if len(batch) == 1:
            return _fail(batch, exc)
        # 3. A document is at fault, or all of the request: two documents alone tell which.
        if limit is None and not known_fault and exc.status != 413:
            by_size = sorted(batch, key=lambda text: (not text.ids and not text.text.strip(), _size(text)))
            alone = by_size[:: max(1, len(batch) // 2)][:2]
            await self._send_all([[text] for text in alone])
            batch = [text for text in batch if text not in alone]
            if all(text.failed for text in alone):
                return _fail(batch, exc)
        middle = (len(batch) + 1) // 2
        halves = [half for half in (batch[:middle], batch[middle:]) if half]
        ends = await asyncio.gather(*(self._send(half, known_fault=True) for half in halves), return_exceptions=True)
        for end in ends:
            if end is not None:
                raise end
        return None

    def _cut_again(self, batch: list[SentText]) -> list[SentText] | None:
        """Return the batch as the encoder cuts it now, or None if that is how it was cut before."""
        encoder = self.session.encoder
        if encoder is None or all((text.cut_for or 0) <= encoder.max_length for text in batch):
            return None
        places: dict[int, list[SentText]] = {}
        for text in batch:
            places.setdefault(id(text.of), []).append(text)
        again = []
        for texts in places.values():
            query, where = texts[0].of, [text.place for text in texts]
            by_ids = self.session.route is not None
            again += _prompts(encoder, query, where) if by_ids else self._texts(query, where)
        return again

    def _shorter(self, sent: SentText) -> SentText | None:
        """Return a text cut by an estimate, or None where it is sent as ids or cannot be shorter."""
        known = (self.session.length, self.config.max_length)
        most = min(length for length in known if length is not None) - TEMPLATE_TOKENS
        if sent.ids is not None or most <= 0:
            return None
        found = shorter_text(sent.text, most, beside=sent.of.beside, tries=sent.cuts)
        if found is None:
            return None
        text, tokens = found
        sent.of.kept_chars[sent.place] = len(text)
        return replace(sent, text=text, cut_for=tokens, cuts=sent.cuts + 1)

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

    def _collect(self, batch: list[SentText], answer: ParsedAnswer) -> None:
        """Take the scores of one request to its texts."""
        for piece, score in zip(batch, answer.scores, strict=True):
            piece.of.reported[piece.place] = score
        query = batch[0].of
        counts = (query.prompt_tokens, answer.prompt_tokens)
        query.prompt_tokens = None if counts[0] is None or counts[1] is None else counts[0] + counts[1]


def _prompts(encoder: PromptEncoder, query: QueryTexts, places: Sequence[int]) -> list[SentText]:
    prompts = encoder.encode_checked(query.query, [query.texts[place] for place in places], query.instruction)
    query.tokens[list(places)] = [len(prompt.ids) for prompt in prompts]
    query.kept_chars[list(places)] = [prompt.kept_chars for prompt in prompts]
    return [
        SentText(query, place, ids=prompt.ids.tolist(), cut_for=encoder.max_length)
        for place, prompt in zip(places, prompts, strict=True)
    ]


def _fail(batch: list[SentText], exc: Exception) -> None:
    for piece in batch:
        piece.of.errors[piece.place] = exc


def _size(text: SentText) -> int:
    return len(text.text) if text.ids is None else len(text.ids)


def _is_of(limit: Limit | None, what: str) -> bool:
    return limit is not None and limit.of == what


def _is_evenly_too_large(exc: BackendRejectedError, limit: Limit | None, batch: list[SentText]) -> bool:
    """Whether a body is too large by the number of its documents, and not by one of them."""
    sizes = [_size(text) for text in batch]
    return exc.status == 413 and limit is None and 2 * max(sizes) <= sum(sizes)


def _chunks(pieces: list[SentText], size: int) -> list[list[SentText]]:
    return [pieces[start : start + size] for start in range(0, len(pieces), size)]
