"""Scoring of requests: documents cut as asked for, slices that wait for slots, tokens counted."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from qwen_rerank.errors import InvalidInputError, QueryTooLongError
from qwen_rerank.reranker import LongDocuments, Reranker
from qwen_rerank.scorers.base import Arguments, BaseScorer, Prepared, ScoreRequest
from qwen_rerank.serve.admission import Admission, FairQueue
from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.schemas import ScoringBody
from qwen_rerank.serve.settings import ServeSettings
from qwen_rerank.types import Document, Fit, RankedDocument, Scores

T = TypeVar("T")

Fits = Callable[[Sequence[str]], list[Fit]]
Slice = tuple[int, int, int]  # start, stop, tokens

_ASCII_CHARS_PER_TOKEN = 4
_CLOSE_ENOUGH = 0.98  # of a token limit, when looking for the place to cut
_AHEAD = 16  # times what fills the room is looked at next, so that a long text is not copied for every step


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankJob:
    """One query of a request with its documents, all checked."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None
    long_documents: LongDocuments | None = None
    max_tokens_per_doc: int | None = None
    max_prompt_tokens: int | None = None


def job_of(wanted: ScoringBody, query: str, documents: Sequence[str]) -> RerankJob:
    """Return the job that a request wants done for a query and its documents."""
    prompt_tokens = wanted.truncate_prompt_tokens
    return RerankJob(
        query=query,
        documents=documents,
        instruction=wanted.wanted_instruction,
        long_documents=wanted.wanted_long_documents,
        max_tokens_per_doc=wanted.max_tokens_per_doc or None,
        max_prompt_tokens=None if prompt_tokens in (None, -1) else prompt_tokens,
    )


@dataclass(frozen=True, slots=True)
class RerankResult:
    """Every document with its scores, best first, and the prompt tokens that it took."""

    ranked: list[RankedDocument]
    tokens: int
    threshold: float | None = None

    def best(self, limit: int | None) -> list[RankedDocument]:
        """Return what a ranked answer holds: at most `limit`, and none below the server's threshold."""
        return [hit for hit in self.ranked[:limit] if self.threshold is None or hit.score >= self.threshold]


class Scoring:
    """Runs jobs on one scorer, in slots.

    Args:
        scorer: Any scorer; calls come from one event loop, several at a time.
        settings: Limits and defaults.
        queue: Hands out the slots.
    """

    def __init__(self, scorer: BaseScorer, settings: ServeSettings, queue: FairQueue) -> None:
        self.scorer = scorer
        self.queue = queue
        self._settings = settings
        if settings.max_running_tokens is None and scorer.token_budget:
            queue.max_running_tokens = 2 * scorer.token_budget
        self._slot_tokens = max(1, queue.max_running_tokens // 4)
        if settings.instruction is not None and not scorer.takes_instruction:
            raise InvalidInputError(
                f"{scorer.name} takes no instruction ({settings.instruction!r}); start the server without one."
            )
        # A calibration of another model ends the start, and a threshold that this scorer's scores have no meaning for.
        Reranker(
            scorer,
            long_documents=settings.long_documents,
            instruction=settings.instruction,
            calibration=settings.calibration,
            threshold=settings.threshold,
        )

    async def run(self, tenant: str, jobs: Sequence[RerankJob], *, timeout_s: float) -> list[RerankResult]:
        """Return the result of every job.

        Raises:
            ApiError: 413 where the request is too large, 429 where it would wait too long; before anything is done.
            TimeoutError: After `timeout_s`; what still waits for its slot is dropped.
            RerankError: Whatever the scorer raises.
        """
        tokens = self._checked_size(jobs)
        with self.queue.admit(tenant, tokens) as admission:
            async with self.queue.deadline(timeout_s):
                return await _together([self._run(admission, job) for job in jobs])

    def instruction(self, given: str | None) -> str | None:
        """Return what relevance means to a request that gives this; None for the scorer's default."""
        return given or self._settings.instruction

    def _checked_size(self, jobs: Sequence[RerankJob]) -> int:
        """Return about how many tokens a request has.

        Raises:
            ApiError: 413.
        """
        settings = self._settings
        n_documents = sum(len(job.documents) for job in jobs)
        if n_documents > settings.max_documents:
            message = f"{n_documents} documents are more than the {settings.max_documents} of one request."
            raise ApiError(413, "too_many_documents", message, param="documents")
        tokens = sum(map(self._estimate, jobs))
        if tokens > settings.max_request_tokens:
            message = f"the request has more than about {settings.max_request_tokens} tokens; split it."
            raise ApiError(413, "too_many_tokens", message, param="documents")
        return tokens

    def _estimate(self, job: RerankJob) -> int:
        long_documents = job.long_documents or self._settings.long_documents
        longest = None if long_documents == "windows" else self.scorer.max_length
        return estimate_tokens(job.query, job.documents, longest=longest)

    async def _run(self, admission: Admission, job: RerankJob) -> RerankResult:
        texts = await self._cut(job)
        scorer = SlotScorer(self.scorer, admission, self._slot_tokens)
        reranker = Reranker(
            scorer,
            long_documents=job.long_documents or self._settings.long_documents,
            instruction=self.instruction(job.instruction),
            calibration=self._settings.calibration,
        )
        documents = [Document(str(index), text) for index, text in enumerate(texts)]
        ranked = await reranker.arerank_checked(job.query, documents)
        if texts is not job.documents:
            ranked = [_mark_cut(hit, job.documents[hit.index]) for hit in ranked]
        return RerankResult(ranked, scorer.tokens, self._settings.threshold)

    async def _cut(self, job: RerankJob) -> Sequence[str]:
        """Return the documents, cut where the request asks for less than the model could read."""
        if not job.max_tokens_per_doc and job.max_prompt_tokens is None:
            return job.documents
        return await asyncio.to_thread(self._cut_now, job)

    def _cut_now(self, job: RerankJob) -> list[str]:
        instruction = self.instruction(job.instruction)

        def fit(texts: Sequence[str]) -> list[Fit]:
            try:
                return self.scorer.measure(job.query, texts, instruction)
            except QueryTooLongError:
                raise
            except InvalidInputError as exc:
                message = "this model has no tokenizer here, so it cannot count tokens."
                raise ApiError(422, "tokens_unknown", message, param="max_tokens_per_doc") from exc

        limits = [job.max_tokens_per_doc] if job.max_tokens_per_doc else []
        if job.max_prompt_tokens is not None:
            limits.append(job.max_prompt_tokens - self._overhead(fit([""])[0]))
        if min(limits) < 1:
            message = "truncate_prompt_tokens: leaves no token for a document beside the query."
            raise ApiError(422, "prompt_too_long", message, param="truncate_prompt_tokens")
        return cut_to_tokens(job.documents, fit, min(limits))

    def _overhead(self, fit: Fit) -> int:
        if self.scorer.max_length is None:
            message = "this model does not say how long a prompt may be."
            raise ApiError(422, "tokens_unknown", message, param="truncate_prompt_tokens")
        return self.scorer.max_length - fit.room


class SlotScorer(BaseScorer):
    """The scorer of one request: its texts are made ready once and go to the real one in slices, each in a slot.

    Attributes:
        tokens: Prompt tokens so far; exact where the scorer tells, else estimated.
    """

    def __init__(self, scorer: BaseScorer, admission: Admission, slot_tokens: int) -> None:
        self.name = scorer.name
        self.fingerprint = scorer.fingerprint
        self.takes_instruction = scorer.takes_instruction
        self.tokens = 0
        self._scorer = scorer
        self._admission = admission
        self._slot_tokens = slot_tokens

    async def arun(self, arguments: Arguments) -> list[Scores]:
        """Return the scores of every query of a checked call; the first error stops the rest."""
        call = self._call(arguments)
        results = arguments.spread(await _together([self._score(request) for request in call.requests]))
        for row, scores in zip(arguments.rows, results, strict=True):
            known = scores.tokens >= 0
            self.tokens += int(scores.tokens[known].sum())
            if not known.all():
                unknown = [row.texts[place] for place in np.flatnonzero(~known)]
                self.tokens += estimate_tokens(row.query, unknown)
        return results

    async def _score(self, request: ScoreRequest) -> Scores:
        """Make a request ready in its first slot, so that this waits as well, and score it slice by slice."""
        head, *sizes = text_sizes(request.query, request.texts, longest=self._scorer.max_length)
        _, _, expected = slices(head, sizes, self._slot_tokens)[0]
        async with _tasks() as tasks, self._admission.slot(expected):
            prepared = await self._scorer.aprepare(request)
            shared = prepared.shared_tokens
            costs = [
                size if tokens < 0 else tokens - shared
                for tokens, size in zip(prepared.tokens.tolist(), sizes, strict=True)
            ]
            (start, stop, _), *others = slices(shared, costs, self._slot_tokens)
            waiting = [tasks.create_task(self._slice(prepared, each)) for each in others]
            first = await prepared.ascore(start, stop)
        return _concatenated([first, *(task.result() for task in waiting)])

    async def _slice(self, prepared: Prepared, place: Slice) -> Scores:
        start, stop, tokens = place
        async with self._admission.slot(tokens):
            return await prepared.ascore(start, stop)

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        return self._scorer.measure(query, texts, instruction)

    def _check_open(self) -> None:
        self._scorer._check_open()


def slices(shared: int, costs: Sequence[int], most: int) -> list[Slice]:
    """Return slices of texts that cost about `most` tokens each, or are one text alone; the first pays what is shared."""
    found: list[Slice] = []
    start, total = 0, shared
    for index, cost in enumerate(costs):
        if index > start and total + cost > most:
            found.append((start, index, total))
            start, total = index, 0
        total += cost
    return [*found, (start, len(costs), total)]


def _concatenated(parts: Sequence[Scores]) -> Scores:
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.log_odds) for part in parts)]).tolist()
    return Scores(
        log_odds=np.concatenate([part.log_odds for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        kept_chars=np.concatenate([part.kept_chars for part in parts]),
        errors={
            start + index: error
            for start, part in zip(starts, parts, strict=False)
            for index, error in part.errors.items()
        },
    )


@asynccontextmanager
async def _tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Yield a task group of which the first error stops the other tasks and is raised as itself."""
    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            # A group holds its task, a failed task its calls: were the group a variable of these, all would hold the
            # request until the garbage collector comes by. The same goes for the group of errors below.
            yield weakref.proxy(group)
    except BaseExceptionGroup as exc:
        first = exc.exceptions[0]
        exc.__traceback__ = None
    del group
    if first is not None:
        raise first


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    async with _tasks() as group:
        tasks = [group.create_task(each) for each in work]
    return [task.result() for task in tasks]


def estimate_tokens(query: str, documents: Sequence[str], *, longest: int | None = None) -> int:
    """Return about how many tokens there are, without tokenizing: a little more than English or Chinese needs.

    Args:
        query: Counted once, since its prefix is computed once.
        documents: Counted up to `longest` each.
        longest: Tokens above which a document is cut; None where it is not.
    """
    return sum(text_sizes(query, documents, longest=longest))


def text_sizes(query: str, documents: Sequence[str], *, longest: int | None = None) -> list[int]:
    """Return `estimate_tokens` of the query and of each document."""
    sizes = [len(text) // _ASCII_CHARS_PER_TOKEN + 1 if text.isascii() else len(text) for text in (query, *documents)]
    return sizes if longest is None else [sizes[0], *(min(size, longest) for size in sizes[1:])]


def cut_to_tokens(texts: Sequence[str], fit: Fits, limit: int) -> list[str]:
    """Return the texts cut at their ends to at most `limit` tokens each, and hardly less; each is measured as it is."""
    cuts = [_Cut(text, limit) for text in texts]
    pending = cuts
    while pending:
        for cut, measured in zip(pending, fit([cut.guess_text for cut in pending]), strict=True):
            cut.take(measured)
        pending = [cut for cut in pending if not cut.done]
    return [cut.text[: cut.kept] for cut in cuts]


@dataclass(slots=True)
class _Cut:
    """The search for the longest beginning of a text that has few enough tokens: between `kept` and `too_long`."""

    text: str
    limit: int  # of what begins at `start`
    start: int = 0
    kept: int = 0
    too_long: int = 0
    guess: int = 0
    done: bool = False
    rounds: int = 0

    def __post_init__(self) -> None:
        self.guess = len(self.text)
        self.too_long = len(self.text) + 1

    @property
    def guess_text(self) -> str:
        return self.text[self.start : self.guess]

    def take(self, measured: Fit) -> None:
        if not measured.fits and measured.tokens <= self.limit and measured.kept_chars:
            self._go_on(measured)
        else:
            self._narrow(measured)
        self.done = self.done or self.too_long - self.kept <= 1

    def _go_on(self, measured: Fit) -> None:
        """Search behind what fills the room: of all that is longer the count says only "at least"."""
        self.start = self.kept = self.start + measured.kept_chars
        self.limit -= measured.room
        self.guess = min(self.too_long - 1, self.start + _AHEAD * measured.kept_chars)
        self.rounds = 0

    def _narrow(self, measured: Fit) -> None:
        chars = min(self.guess - self.start, measured.kept_chars)
        tokens = min(measured.tokens, measured.room)
        if measured.fits and measured.tokens <= self.limit:
            self.kept = self.guess
            self.done = self.guess == len(self.text) or measured.tokens >= _CLOSE_ENOUGH * self.limit
        else:
            self.too_long = self.guess
        self.rounds += 1
        # By proportion first, which nearly always hits; by halves when the text is very uneven.
        by_share = self.start + chars * self.limit // max(1, tokens)
        middle = (self.kept + self.too_long) // 2
        self.guess = by_share if self.rounds < 4 and self.kept < by_share < self.too_long else middle


def _mark_cut(hit: RankedDocument, original: str) -> RankedDocument:
    """Return the result with the document as it was sent."""
    if hit.document.text == original:
        return hit
    return replace(hit, document=replace(hit.document, text=original), truncated=True)
