"""Searches of the server's own store: what its first stage recalls, ranked by the model as every route has it done."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.excerpts import around, file_filter, heading_of, place_of
from qwen_rerank.pipeline import TwoRounds, TwoStageRetriever
from qwen_rerank.protocols import FirstStage
from qwen_rerank.serve.backend import Backend
from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.responses import MovedPassage, NeighbourPassage, RankedPassage, StoreSearchAnswer
from qwen_rerank.serve.schemas import ScoringBody, StoreSearchRequest
from qwen_rerank.serve.scoring import RerankJob, RerankResult, job_of
from qwen_rerank.serve.settings import ServeSettings
from qwen_rerank.store import FaissStore
from qwen_rerank.types import Candidate, Document, RankedDocument

T = TypeVar("T")

MOST_ANSWER_CHARS = 8_000_000  # of all texts of an answer: documents of a store may be of any size
BEGINNING_CHARS = 700  # of a passage that is no result
_AT_ONCE = 4  # searches of the store, which cost the processor as much as the model's work does
_MOST_WAITING = 64

Run = Callable[[Request, Any, Sequence[RerankJob]], Awaitable[list[RerankResult]]]


def no_store(param: str | None = None) -> ApiError:
    """Return the error of a search on a server that has nothing to search."""
    return ApiError(422, "no_store", "this server has no store; start it with --store.", param=param)


class StoreSearch:
    """The search of `/v1/search`: passages with their places, as `qwen-rerank search` shows them.

    Args:
        backend: Tells which model is behind it.
        settings: The server's.
        run: Scores jobs as every route does.
        turns: At what is searched, or None.
    """

    def __init__(self, backend: Backend, settings: ServeSettings, run: Run, turns: Turns | None) -> None:
        self._backend = backend
        self._settings = settings
        self._run = run
        self._turns = turns

    async def search(self, request: Request, wanted: StoreSearchRequest) -> StoreSearchAnswer:
        """Return the answer to a request.

        Raises:
            ApiError: 422 without a store, for files that it has not, or a threshold on scores that are no
                probabilities; 413 for too many candidates or too long an answer; 429 while too many others search.
        """
        if (turns := self._turns) is None:
            raise no_store()
        most = self._settings.max_documents
        if wanted.top_k > most:
            message = f"top_k: {wanted.top_k} candidates are more than the {most} of one request."
            raise ApiError(413, "too_many_documents", message, param="top_k")
        if wanted.threshold is not None and self._settings.calibration is None:
            _check_calibrated(self._backend)
        kept = await turns.take(lambda store: _filter(store, wanted))
        second_stage = ServerSecondStage(self._run, request, wanted, above_threshold=True)
        line = TwoStageRetriever(turns, second_stage, top_k=wanted.top_k, top_n=wanted.top_k)
        rounds = await line.aretrieve_rounds(wanted.query, filter=kept, instruction=wanted.wanted_instruction)
        model = self._backend.names.reported
        return await turns.take(lambda store: _answer(store, wanted, rounds, model))


class Turns:
    """A first stage of which few callers have a turn at a time, each in a thread.

    Args:
        store: The first stage.
    """

    def __init__(self, store: FirstStage) -> None:
        self.store = store
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    async def take(self, work: Callable[[FirstStage], T]) -> T:
        """Return what `work` makes of the first stage.

        Raises:
            ApiError: 429 while too many others wait.
        """
        if self._waiting >= _MOST_WAITING:
            raise ApiError(429, "overloaded", "the server is busy: too many searches are waiting.", retry_after_s=1)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        searching = asyncio.ensure_future(asyncio.to_thread(work, self.store))
        # The slot is the thread's, which goes on where its caller no longer waits.
        searching.add_done_callback(lambda _: self._slots.release())
        return await asyncio.shield(searching)

    async def asearch(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """As `search`, when it is this caller's turn."""
        return await self.take(lambda store: store.search(query, top_k, filter=filter))

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Search without a turn."""
        return self.store.search(query, top_k, filter=filter)


class ServerSecondStage:
    """The model as any route asks it: the request is admitted, scored in slots, and counted.

    Args:
        run: Scores jobs as every route does.
        request: The request.
        wanted: Its body.
        above_threshold: Whether what is below the server's threshold is left out.
    """

    name = "server"
    top_n = None

    def __init__(self, run: Run, request: Request, wanted: ScoringBody, *, above_threshold: bool = False) -> None:
        self._run = run
        self._request = request
        self._wanted = wanted
        self._above_threshold = above_threshold

    async def arerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the candidates' texts, most relevant first, each with its place among the candidates as its id."""
        if not candidates:
            return []
        texts = [candidate.document.text for candidate in candidates]
        job = replace(job_of(self._wanted, query, texts), instruction=instruction)
        [result] = await self._run(self._request, self._wanted, [job])
        return result.best(top_n) if self._above_threshold else result.ranked[:top_n]

    def rerank(self, *_: Any, **__: Any) -> list[RankedDocument]:
        """Refuse: a server's requests are awaited."""
        raise NotImplementedError("a server's requests are awaited.")

    def rerank_many(self, *_: Any, **__: Any) -> list[list[RankedDocument]]:
        """Refuse: a server's requests are awaited."""
        raise NotImplementedError("a server's requests are awaited.")


def _check_calibrated(backend: Backend) -> None:
    if not backend.scoring.scorer.calibrated:
        message = "threshold: this model's scores are no probabilities; leave it out."
        raise ApiError(422, "no_probability", message, param="threshold")


def _filter(store: FirstStage, wanted: StoreSearchRequest) -> dict[str, Any] | None:
    if not (wanted.paths or wanted.suffixes or wanted.since or wanted.until):
        return None
    try:
        return file_filter(
            _with_files(store, "paths"),
            paths=wanted.paths or (),
            suffixes=wanted.suffixes or (),
            since=wanted.since,
            until=wanted.until,
        )
    except InvalidInputError:  # its sentence names the store's folder, which is nobody's business here
        raise ApiError(422, "no_such_file", "paths: no file of the store fits.", param="paths") from None


def _with_files(store: FirstStage, param: str) -> FaissStore:
    if not isinstance(store, FaissStore):
        raise ApiError(422, "no_files", f"{param}: what this server searches has no files.", param=param)
    return store


def check_answer(chars: int, *, param: str) -> None:
    """Refuse to answer with more text than one answer may hold.

    Raises:
        ApiError: 413.
    """
    if chars > MOST_ANSWER_CHARS:
        message = f"the passages found have more than {MOST_ANSWER_CHARS} characters; ask for fewer with {param}."
        raise ApiError(413, "answer_too_long", message, param=param)


def plain_number(score: object) -> float | None:
    """Return a first stage's score as JSON has it; None for what is no finite number."""
    try:
        number = float(score)  # type: ignore[arg-type]  # of numpy, too
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def plain_metadata(value: Any) -> Any:
    """Return metadata as JSON can carry it: a store's own always can, another first stage's may hold dates or NaN."""
    if isinstance(value, Mapping):
        return {str(key): plain_metadata(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_metadata(one) for one in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    return plain_number(value) if isinstance(value, float) else str(value)


def _answer(store: FirstStage, wanted: StoreSearchRequest, rounds: TwoRounds, model: str) -> StoreSearchAnswer:
    least = 0.0 if wanted.threshold is None else wanted.threshold
    ranked = [hit for hit in rounds.ranked if hit.score >= least]
    shown, places = ranked[: wanted.top_n], {hit.index for hit in ranked[: wanted.top_n]}
    results = [_found(store, wanted, hit, rounds.candidates[hit.index]) for hit in shown]
    check_answer(sum(map(_chars, results)), param="top_n")
    return StoreSearchAnswer(
        object="list",
        model=model,
        searched=len(store) if isinstance(store, Sized) else None,
        candidates=len(rounds.candidates),
        results=results,
        moved_out=[
            _moved(hit, rounds.candidates[hit.index])
            for hit in ranked
            if hit.index < wanted.top_n and hit.index not in places
        ],
    )


def _found(store: FirstStage, wanted: StoreSearchRequest, hit: RankedDocument, candidate: Candidate) -> RankedPassage:
    document = candidate.document
    found = RankedPassage(
        rank=hit.rank,
        first_stage_rank=candidate.rank,
        place=place_of(document),
        id=document.id,
        score=hit.score,
        log_odds=hit.log_odds,
        index=hit.index,
        first_stage_score=plain_number(candidate.score),
        truncated=hit.truncated,
        windows=hit.windows,
        best_window=hit.best_window,
        text=document.text,
        metadata=plain_metadata(document.metadata),
    )
    if wanted.context:
        above, below = around(_with_files(store, "context"), document, wanted.context)
        found["above"], found["below"] = [_neighbour(one) for one in above], [_neighbour(one) for one in below]
    return found


def _neighbour(document: Document) -> NeighbourPassage:
    return NeighbourPassage(id=document.id, text=document.text, heading=heading_of(document.metadata))


def _moved(hit: RankedDocument, candidate: Candidate) -> MovedPassage:
    document = candidate.document
    return MovedPassage(
        rank=hit.rank,
        first_stage_rank=candidate.rank,
        id=document.id,
        score=hit.score,
        index=hit.index,
        beginning=document.text[:BEGINNING_CHARS],
    )


def _chars(found: RankedPassage) -> int:
    return len(found["text"]) + sum(len(one["text"]) for one in (*found.get("above", ()), *found.get("below", ())))
