"""The base of every scorer: arguments checked once, duplicates removed once, sync and async halves from one method.

A scorer writes one method: `_compute`, which works until it has the scores, or `_begin`, which starts work that can be
waited for and cancelled. Everything that users call is made from it here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from qwen_rerank.checks import check_list, check_query, check_text, check_texts, sift_texts
from qwen_rerank.errors import DocumentScoringError, InvalidInputError, ScorerError
from qwen_rerank.sharing import SharedCopies
from qwen_rerank.types import Fit, Scores

if TYPE_CHECKING:
    from qwen_rerank.prompt import PromptEncoder

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRequest:
    """One query with its distinct texts, all checked.

    Attributes:
        query: What is searched for.
        texts: Each text once.
        instruction: What relevance means; None for the scorer's default.
    """

    query: str
    texts: list[str]
    instruction: str | None = None


class Call:
    """One call of a user, which may be given up before its scores are there. Thread-safe."""

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self.requests = list(requests)
        self.cancelled = False
        self._undo: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def on_cancel(self, undo: Callable[[], object]) -> None:
        """Have `undo` called when the call is given up; at once where it already is."""
        with self._lock:
            if not self.cancelled:
                self._undo.append(undo)
                return
        undo()

    def cancel(self) -> None:
        """Give the call up."""
        with self._lock:
            self.cancelled, undo, self._undo = True, self._undo, []
        for each in undo:
            each()


class Prepared:
    """A request that is ready to be scored in slices; this one only passes them on.

    Attributes:
        tokens: int32 `(n_texts,)`, prompt tokens of each text; -1 where nobody can tell.
        shared_tokens: Tokens that all prompts begin with and that are computed once for all slices; 0 where nobody can
            tell.
    """

    def __init__(self, scorer: BaseScorer, request: ScoreRequest) -> None:
        self.tokens = np.full(len(request.texts), -1, dtype=np.int32)
        self.shared_tokens = 0
        self._scorer = scorer
        self._request = request

    async def ascore(self, start: int, stop: int) -> Scores:
        """Return what came of the texts from `start` up to `stop`; a cancelled wait gives them up."""
        request = self._request
        row = DocumentRow(request.query, request.texts[start:stop])
        [found] = await self._scorer.arun(Arguments([row], request.instruction))
        return found


class BaseScorer(SharedCopies):
    """A `Scorer` and `DetailedScorer` made from one method.

    Attributes:
        name: Short name for people.
        fingerprint: Changes with anything that changes a score.
        takes_instruction: Whether a call may say what relevance means.
    """

    name: str
    fingerprint: str
    takes_instruction = True
    # Threads in which an awaited call does what blocks; None for the event loop's own.
    _threads: Executor | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the sigmoid of a score is a probability of relevance."""
        return True

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest prompt, or None where nobody can tell."""
        return None

    @property
    def token_budget(self) -> int | None:
        """Tokens of one forward pass, or None where there is no such thing."""
        return None

    @property
    def encoder(self) -> PromptEncoder | None:
        """The encoder that builds the prompts, or None where there are none to be seen."""
        return None

    # --- what a scorer writes ------------------------------------------------------------------------------------

    def _begin(self, call: Call) -> Future[list[Scores]]:
        """Begin to score; the future gives for each request what came of its texts, in order.

        Runs in a thread for awaited calls, so it may block. Arguments are checked and no request is without texts.
        """
        future: Future[list[Scores]] = Future()
        future.set_result(self._compute(call.requests))
        return future

    def _compute(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Return for each request what came of its texts; as `_begin`, for a scorer that just works until it is done."""
        raise NotImplementedError(f"{type(self).__name__} must have _compute or _begin.")

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        """Return how checked texts fit beside a query."""
        raise InvalidInputError(
            f"{self.name} has no tokenizer, so it cannot tell how much of a document fits; "
            "use long_documents='truncate' with it, or a scorer with a tokenizer."
        )

    def _check_open(self) -> None:
        """Raise where the scorer cannot be used any more."""

    def prepare(self, request: ScoreRequest) -> Prepared:
        """Return a request made ready once, to be scored in slices that share what is common; may block."""
        return Prepared(self, request)

    async def aprepare(self, request: ScoreRequest) -> Prepared:
        """As `prepare`, without blocking the event loop."""
        import asyncio  # here, as nobody needs it to load a small model

        return await asyncio.get_running_loop().run_in_executor(self._threads, self.prepare, request)

    # --- what users call -----------------------------------------------------------------------------------------

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """Return log-odds of relevance, float32 `(n_documents,)`, input order, higher is better.

        Raises:
            InvalidInputError: If an argument is wrong; `QueryTooLongError` when the query leaves no room.
            DocumentScoringError: If some documents could not be scored; carries the others' scores.
            ScorerError: If the scorer is closed or cannot work at all.
        """
        return _arrays(self.run(Arguments.of_one(query, documents, instruction)))[0]

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """Return one array as `score` gives for each query, batched across queries.

        Raises:
            InvalidInputError: As `score`.
            DocumentScoringError: Of the first query with a failed document; the error's note says which query.
            ScorerError: As `score`.
        """
        return _arrays(self.run(Arguments.of_many(queries, documents, instruction)))

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """As `score`, without blocking the event loop; a cancelled call's documents are not computed."""
        return _arrays(await self.arun(Arguments.of_one(query, documents, instruction)))[0]

    async def ascore_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """As `score_many`, without blocking the event loop."""
        return _arrays(await self.arun(Arguments.of_many(queries, documents, instruction)))

    def score_details(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Scores:
        """Return log-odds, tokens read, characters kept, and the error of each document that failed.

        A document that is no text, or one that UTF-8 cannot carry, fails alone.

        Raises:
            InvalidInputError: If another argument is wrong; `QueryTooLongError` when the query leaves no room.
            ScorerError: If the scorer is closed or cannot work at all.
        """
        return self.run(Arguments.of_one(query, documents, instruction, strict=False))[0]

    def score_details_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[Scores]:
        """Return `score_details` of every query with its documents, batched across queries."""
        return self.run(Arguments.of_many(queries, documents, instruction, strict=False))

    async def ascore_details(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Scores:
        """As `score_details`, without blocking the event loop."""
        return (await self.arun(Arguments.of_one(query, documents, instruction, strict=False)))[0]

    async def ascore_details_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[Scores]:
        """As `score_details_many`, without blocking the event loop."""
        return await self.arun(Arguments.of_many(queries, documents, instruction, strict=False))

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Return for each text its tokens, the room beside this query, and how many characters are kept.

        Raises:
            InvalidInputError: If an argument is wrong, or this scorer has no tokenizer; `QueryTooLongError` when the
                query leaves no room.
        """
        return self.measure(check_query(query), check_texts("texts", texts), _checked_instruction(instruction))

    # --- the same for callers that have checked ------------------------------------------------------------------

    def run(self, arguments: Arguments) -> list[Scores]:
        """Return the scores of every query of a checked call."""
        call = self._call(arguments)
        try:
            return arguments.spread(self._begin(call).result() if call.requests else [])
        except BaseException:  # also an interrupted wait: nobody will read the scores
            call.cancel()
            raise

    async def arun(self, arguments: Arguments) -> list[Scores]:
        """As `run`, without blocking the event loop."""
        import asyncio  # as above

        call = self._call(arguments)
        if not call.requests:
            return arguments.spread([])
        try:
            loop = asyncio.get_running_loop()
            future: Future[list[Scores]] = await loop.run_in_executor(self._threads, self._begin, call)
            found: list[Scores] = await asyncio.wrap_future(future)
            return arguments.spread(found)
        except BaseException:
            call.cancel()
            raise

    def measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        """Return what `fit` does for checked arguments."""
        self._check(instruction)
        return self._measure(query, texts, instruction)

    def _call(self, arguments: Arguments) -> Call:
        self._check(arguments.instruction)
        return Call(arguments.requests)

    def _check(self, instruction: str | None) -> None:
        self._check_open()
        if instruction is not None and not self.takes_instruction:
            raise InvalidInputError(
                f"{self.name} takes no instruction ({instruction!r}); leave it out, or put it into the query."
            )


@dataclass(frozen=True, slots=True, eq=False)
class DocumentRow:
    """One query of a call with its documents as they were given, checked.

    Attributes:
        query: What is searched for.
        texts: The documents, duplicates included.
        bad: Place of each document that is no text to the reason.
    """

    query: str
    texts: list[str]
    bad: Mapping[int, Exception] = field(default_factory=dict)


class Arguments:
    """The checked arguments of one call. Of every query each text is computed once, so that equal texts score the same.

    Args:
        rows: The queries with their documents.
        instruction: What relevance means; None for the scorer's default.
    """

    def __init__(self, rows: Sequence[DocumentRow], instruction: str | None = None) -> None:
        self.rows = rows
        self.instruction = instruction
        self._places: dict[str, dict[str, int]] = {}  # query → text → place in its request
        for row in rows:
            texts = [text for i, text in enumerate(row.texts) if i not in row.bad] if row.bad else row.texts
            if texts:
                known = self._places.setdefault(row.query, {})
                for text in texts:
                    known.setdefault(text, len(known))

    @classmethod
    def of_one(
        cls, query: object, documents: object, instruction: object, *, strict: bool = True, name: str = "documents"
    ) -> Arguments:
        """Check the arguments of a call for one query; with `strict` a document that is no text is an error."""
        return cls([_row(check_query(query), documents, name, strict)], _checked_instruction(instruction))

    @classmethod
    def of_many(cls, queries: object, documents: object, instruction: object, *, strict: bool = True) -> Arguments:
        """Check the arguments of a call for several queries."""
        asked = check_list("queries", queries, of="strings")
        lists = check_list("documents", documents, of="lists, one for each query")
        if len(lists) != len(asked):
            raise InvalidInputError(
                f"documents has {len(lists)} lists for {len(asked)} queries; give one list of texts for each query."
            )
        rows = [
            _row(check_query(query, name=f"queries[{i}]"), texts, f"documents[{i}]", strict)
            for i, (query, texts) in enumerate(zip(asked, lists, strict=True))
        ]
        return cls(rows, _checked_instruction(instruction))

    @property
    def requests(self) -> list[ScoreRequest]:
        """The work to be done: each query that has texts, once."""
        return [ScoreRequest(query, list(places), self.instruction) for query, places in self._places.items()]

    def spread(self, found: Sequence[Scores]) -> list[Scores]:
        """Return the scores of each row's documents from those of `requests`."""
        by_query = dict(zip(self._places, found, strict=True))
        return [_spread(row, by_query.get(row.query), self._places.get(row.query, {})) for row in self.rows]


def _row(query: str, documents: object, name: str, strict: bool) -> DocumentRow:
    texts, bad = sift_texts(name, documents)
    if strict and bad:
        raise bad[min(bad)]
    return DocumentRow(query, texts, bad)


def _checked_instruction(instruction: object) -> str | None:
    return None if instruction is None else check_text("instruction", instruction)


def _spread(row: DocumentRow, found: Scores | None, places: Mapping[str, int]) -> Scores:
    """Return the scores of distinct texts in the order of a row's documents; NaN and -1 for what is no text."""
    order = np.array([-1 if i in row.bad else places[text] for i, text in enumerate(row.texts)], dtype=np.int64)
    if found is None:  # nothing of this row could be computed
        found = unscored(1, {})
    elif len(order) == len(found.log_odds) and np.array_equal(order, np.arange(len(order))):
        return found
    taken = found.take(order)
    return replace(taken, errors=dict(sorted({**row.bad, **taken.errors}.items())))


def unscored(n_documents: int, errors: Mapping[int, Exception]) -> Scores:
    """Return scores of which nothing is known but why there are none."""
    unknown = np.full(n_documents, -1, dtype=np.int32)
    return Scores(np.full(n_documents, np.nan, dtype=np.float32), unknown, unknown.copy(), errors)


def _arrays(found: Sequence[Scores]) -> list[np.ndarray]:
    """Return the log-odds alone.

    Raises:
        DocumentScoringError: Of the first query with a failed document.
    """
    for i, scores in enumerate(found):
        if scores.errors:
            error = DocumentScoringError(scores.errors, scores.log_odds)
            error.add_note(f"queries[{i}]")
            raise error
    return [scores.log_odds for scores in found]


def mapped(future: Future[T], change: Callable[[T], U]) -> Future[U]:
    """Return a future of `change(result)`; an error or a cancellation passes through."""
    out: Future[U] = Future()

    def settle(done: Future[T]) -> None:
        if not out.set_running_or_notify_cancel():
            return
        try:
            out.set_result(change(done.result()))
        except CancelledError:
            out.set_exception(ScorerError("the call was cancelled."))
        except BaseException as exc:
            out.set_exception(exc)

    future.add_done_callback(settle)
    return out


def joined(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """Return a future of all results in order; the first error or cancellation is its own."""
    out: Future[list[T]] = Future()
    lock, left = threading.Lock(), len(futures)

    def settle(done: Future[T]) -> None:
        nonlocal left
        error = ScorerError("the call was cancelled.") if done.cancelled() else done.exception()
        with lock:
            left -= 1
            if out.done() or (error is None and left):
                return
            if error is not None:
                out.set_exception(error)
            else:
                out.set_result([future.result() for future in futures])

    if not futures:
        out.set_result([])
    for future in futures:
        future.add_done_callback(settle)
    return out
