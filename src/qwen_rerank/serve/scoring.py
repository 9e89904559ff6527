"""One request's way through the model: cut, take turns, score, count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qwen_rerank.errors import DocumentScoringError, InvalidInputError, QueryTooLongError, ScorerError
from qwen_rerank.protocols import Scorer
from qwen_rerank.reranker import LongDocuments, Reranker
from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.queue import FairQueue, Ticket
from qwen_rerank.serve.settings import ServeSettings
from qwen_rerank.threaded import ThreadedScorer
from qwen_rerank.types import Document, Fit, RankedDocument

T = TypeVar("T")

Fits = Callable[[Sequence[str]], list[Fit]]

_ASCII_CHARS_PER_TOKEN = 4
_CLOSE_ENOUGH = 0.98  # of a token limit, when looking for the place to cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a request wants scored: one query with its documents."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None
    long_documents: LongDocuments | None = None
    max_tokens_per_doc: int | None = None
    max_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Every document with its scores, best first, and the prompt tokens that it took."""

    ranked: list[RankedDocument]
    tokens: int


class Scoring:
    """Runs jobs on one scorer, in turns.

    Args:
        scorer: Any scorer; calls come from one event loop, several at a time.
        settings: Limits and defaults.
        queue: Hands out the turns.
    """

    def __init__(self, scorer: Scorer, settings: ServeSettings, queue: FairQueue) -> None:
        self.scorer = scorer
        self.queue = queue
        self._settings = settings
        self.max_length = _max_length(scorer)
        if settings.max_running_tokens is None and (budget := getattr(scorer, "token_budget", None)):
            queue.max_running_tokens = 2 * budget
        self._chunk_tokens = max(1, queue.max_running_tokens // 4)

    async def run(self, tenant: str, jobs: Sequence[Job], *, timeout_s: float) -> list[Outcome]:
        """Return the outcome of every job.

        Raises:
            ApiError: 413 where the request is too large, 429 where it would wait too long; before anything is done.
            TimeoutError: After `timeout_s`; what still waits for its turn is dropped.
            RerankError: Whatever the scorer raises.
        """
        self._check_size(jobs)
        with self.queue.admit(tenant, sum(map(self._estimate, jobs))) as ticket:
            async with self.queue.deadline(timeout_s):
                return await _together([self._run(ticket, job) for job in jobs])

    def _check_size(self, jobs: Sequence[Job]) -> None:
        settings = self._settings
        n_documents = sum(len(job.documents) for job in jobs)
        if n_documents > settings.max_documents:
            message = f"{n_documents} documents are more than the {settings.max_documents} of one request."
            raise ApiError(413, "too_many_documents", message, param="documents")
        if sum(map(self._estimate, jobs)) > settings.max_request_tokens:
            message = f"the request has more than about {settings.max_request_tokens} tokens; split it."
            raise ApiError(413, "too_many_tokens", message, param="documents")

    def _estimate(self, job: Job) -> int:
        long_documents = job.long_documents or self._settings.long_documents
        longest = None if long_documents == "windows" else self.max_length
        return estimate_tokens(job.query, job.documents, longest=longest)

    async def _run(self, ticket: Ticket, job: Job) -> Outcome:
        texts = await self._cut(job)
        turns = TurnScorer(self.scorer, ticket, self._chunk_tokens, max_length=self.max_length)
        reranker = Reranker(
            turns,
            long_documents=job.long_documents or self._settings.long_documents,
            instruction=job.instruction or self._settings.instruction,
        )
        documents = [Document(str(index), text) for index, text in enumerate(texts)]
        ranked = await reranker.arerank(job.query, documents)
        return Outcome([_mark_cut(hit, job.documents) for hit in ranked], turns.tokens)

    async def _cut(self, job: Job) -> Sequence[str]:
        """Return the documents, cut where the request asks for less than the model could read."""
        if not job.max_tokens_per_doc and job.max_prompt_tokens is None:
            return job.documents
        return await asyncio.to_thread(self._cut_now, job)

    def _cut_now(self, job: Job) -> list[str]:
        instruction = job.instruction or self._settings.instruction

        def fit(texts: Sequence[str]) -> list[Fit]:
            try:
                return self.scorer.fit(job.query, texts, instruction=instruction)
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
        if self.max_length is None:
            message = "this model does not say how long a prompt may be."
            raise ApiError(422, "tokens_unknown", message, param="truncate_prompt_tokens")
        return self.max_length - fit.room


class TurnScorer(ThreadedScorer):
    """A scorer for one request: its texts go to the real one in chunks, each when its turn has come.

    Attributes:
        tokens: Prompt tokens so far; exact where the scorer has a tokenizer and says its `max_length`, else estimated.
    """

    def __init__(self, scorer: Scorer, ticket: Ticket, chunk_tokens: int, *, max_length: int | None) -> None:
        self.name = scorer.name
        self.fingerprint = scorer.fingerprint
        self.calibrated = getattr(scorer, "calibrated", True)
        self.tokens = 0
        self._scorer = scorer
        self._ticket = ticket
        self._chunk_tokens = chunk_tokens
        self._max_length = max_length

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """Return log-odds, float32 `(n_documents,)`; of all chunks, the first error wins."""
        scores = np.full(len(documents), np.nan, dtype=np.float32)
        failed: dict[int, Exception] = {}

        async def score(start: int, end: int, cost: int) -> int:
            async with self._ticket.turn(cost):
                try:
                    found = await self._scorer.ascore(query, documents[start:end], instruction=instruction)
                except DocumentScoringError as exc:
                    found = exc.scores
                    failed.update({start + index: error for index, error in exc.failed.items()})
            if np.shape(found) != (end - start,):
                raise ScorerError(f"{self.name} gave scores of shape {np.shape(found)} for {end - start} documents.")
            scores[start:end] = found
            return 0

        chunks = [score(*chunk) for chunk in self._chunks(query, documents)]
        counting = asyncio.to_thread(self._count, query, documents, instruction)
        self.tokens += sum(await _together([counting, *chunks]))
        if failed:
            raise DocumentScoringError(failed, scores)
        return scores

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """As the real scorer."""
        return self._scorer.fit(query, texts, instruction=instruction)

    def _chunks(self, query: str, documents: Sequence[str]) -> Iterator[tuple[int, int, int]]:
        """Yield `(start, end, tokens)` of chunks that hold about `chunk_tokens` each, at least one document."""
        head = estimate_tokens(query, [])
        start, cost = 0, head
        for index, text in enumerate(documents):
            tokens = estimate_tokens("", [text], longest=self._max_length)
            if index > start and cost + tokens > self._chunk_tokens:
                yield start, index, cost
                start, cost = index, head
            cost += tokens
        yield start, len(documents), cost

    def _count(self, query: str, documents: Sequence[str], instruction: str | None) -> int:
        """Return the prompt tokens of all pairs."""
        fits: list[Fit] = []
        with suppress(InvalidInputError):  # no tokenizer to ask
            fits = self._scorer.fit(query, documents, instruction=instruction)
        if not fits:
            return estimate_tokens(query, documents)
        return sum((self._max_length or fit.room) - fit.room + min(fit.tokens, fit.room) for fit in fits)


def _max_length(scorer: Scorer) -> int | None:
    """Return the longest prompt in tokens, where the scorer says it."""
    for holder in (scorer, getattr(scorer, "config", None)):
        if isinstance(length := getattr(holder, "max_length", None), int):
            return length
    return None


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results; the first error stops the others and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0]  # noqa: B904 - its own cause stays
    return [task.result() for task in tasks]


def estimate_tokens(query: str, documents: Sequence[str], *, longest: int | None = None) -> int:
    """Return about how many tokens there are, without tokenizing: a little more than English or Chinese needs.

    Args:
        query: Counted once, since its prefix is computed once.
        documents: Counted up to `longest` each.
        longest: Tokens above which a document is cut; None where it is not.
    """
    sizes = [len(text) // _ASCII_CHARS_PER_TOKEN + 1 if text.isascii() else len(text) for text in (query, *documents)]
    return sizes[0] + sum(size if longest is None else min(size, longest) for size in sizes[1:])


def cut_to_tokens(texts: Sequence[str], fit: Fits, limit: int) -> list[str]:
    """Return the texts cut at their ends to at most `limit` tokens each, and hardly less; each is measured as it is."""
    cuts = [_Cut(text) for text in texts]
    pending = cuts
    while pending:
        for cut, measured in zip(pending, fit([cut.guess_text for cut in pending]), strict=True):
            cut.take(measured, limit)
        pending = [cut for cut in pending if not cut.done]
    return [cut.text[: cut.kept] for cut in cuts]


@dataclass(slots=True)
class _Cut:
    """The search for the longest beginning of a text that has few enough tokens: between `kept` and `too_long`."""

    text: str
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
        return self.text[: self.guess]

    def take(self, measured: Fit, limit: int) -> None:
        chars = min(self.guess, measured.kept_chars)
        tokens = min(measured.tokens, measured.room)
        if measured.tokens <= limit:
            self.kept = self.guess
            self.done = self.guess == len(self.text) or measured.tokens >= _CLOSE_ENOUGH * limit
        else:
            self.too_long = self.guess
        self.rounds += 1
        # By proportion first, which nearly always hits; by halves when the text is very uneven.
        by_share = chars * limit // max(1, tokens)
        middle = (self.kept + self.too_long) // 2
        self.guess = by_share if self.rounds < 4 and self.kept < by_share < self.too_long else middle
        self.done = self.done or self.too_long - self.kept <= 1


def _mark_cut(hit: RankedDocument, originals: Sequence[str]) -> RankedDocument:
    """Return the result with the document as it was sent."""
    original = originals[hit.index]
    if hit.document.text == original:
        return hit
    return RankedDocument(
        document=Document(hit.document.id, original),
        score=hit.score,
        log_odds=hit.log_odds,
        rank=hit.rank,
        index=hit.index,
        truncated=True,
        windows=hit.windows,
        best_window=hit.best_window,
    )
