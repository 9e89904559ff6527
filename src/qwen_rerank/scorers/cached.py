"""`CachedScorer`: a scorer that asks a cache first, and computes what several callers want at once only once."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError, ScorerError
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.protocols import FingerprintedScorer, SimpleScorer
from qwen_rerank.scorers.adapted import AdaptedScorer, as_scorer
from qwen_rerank.scorers.base import BaseScorer, Call, Prepared, ScoreRequest, joined, mapped
from qwen_rerank.scorers.score_cache import DEFAULT_SIZE, KeptScore, ScoreCache, score_key
from qwen_rerank.sharing import made_from, renew_in_child
from qwen_rerank.types import Fit, Scores

logger = logging.getLogger(__name__)

Outcome = KeptScore | Exception


class _Flight:
    """Scores that are being computed for one or more calls; given up when nobody waits for them any more."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = list(keys)
        self.future: Future[dict[bytes, Outcome]] = Future()
        self.waiting = 1
        self.cancel: Callable[[], object] = lambda: None
        self.given_up = False


class CachedScorer(BaseScorer):
    """A scorer that computes no score twice: asks a cache first, and waits where another call computes the same.

    A hit is faster than a miss. Whoever may call this scorer can find out by timing whether the very same query and text
    were scored before, by anyone; where callers must not know of each other, give each a cache of its own, or none.

    Args:
        scorer: Any scorer with a fingerprint, or a name that `load_scorer` knows. Closing it stays the caller's.
        cache: A `ScoreCache`; a path for one with a file; a number for one of so many scores in memory.

    Raises:
        InvalidInputError: If the scorer has no fingerprint, so that nobody can tell when its scores change.
    """

    def __init__(
        self, scorer: SimpleScorer | str, *, cache: ScoreCache | str | os.PathLike[str] | int = DEFAULT_SIZE
    ) -> None:
        own = scorer._scorer if isinstance(scorer, AdaptedScorer) else scorer
        if not isinstance(scorer, str) and not isinstance(own, FingerprintedScorer):
            raise InvalidInputError(
                f"{scorer.name} has no fingerprint, so nobody can tell when its scores change; give it one, or no cache."
            )
        self._scorer = as_scorer(scorer)
        self.cache = open_cache(cache)
        self.name = self._scorer.name
        self.takes_instruction = self._scorer.takes_instruction
        self._flights: dict[bytes, _Flight] = {}
        self._lock = threading.Lock()
        self._threads = self._scorer._threads
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child: what the parent computes does not land here."""
        self._lock, self._flights = threading.Lock(), {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle scorer and cache, each in its own way."""
        return made_from, (type(self), {"scorer": self._scorer, "cache": self.cache})

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The scorer's own."""
        return self._scorer.fingerprint

    @property
    def calibrated(self) -> bool:
        """The scorer's own word."""
        return self._scorer.calibrated

    @property
    def max_length(self) -> int | None:
        """The scorer's own."""
        return self._scorer.max_length

    @property
    def token_budget(self) -> int | None:
        """The scorer's own."""
        return self._scorer.token_budget

    @property
    def encoder(self) -> PromptEncoder | None:
        """The encoder that builds the scorer's prompts."""
        return self._scorer.encoder

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        return self._scorer.measure(query, texts, instruction)

    def _check_open(self) -> None:
        self._scorer._check_open()

    def _keys(self, request: ScoreRequest) -> list[bytes]:
        fingerprint = self.fingerprint
        return [score_key(fingerprint, request.instruction, request.query, text) for text in request.texts]

    def _begin(self, call: Call) -> Future[list[Scores]]:
        """Score what neither the cache knows nor another call computes."""
        keys = [self._keys(request) for request in call.requests]
        known, own, others = self._claim([key for each in keys for key in each])
        flights = [*others, *([own] if own else [])]
        for flight in flights:
            call.on_cancel(partial(self._leave, flight))
        if own is not None:
            self._start(own, call.requests, keys)

        def scores(landed: list[dict[bytes, Outcome]]) -> list[Scores]:
            outcomes: dict[bytes, Outcome] = {**known}
            for each in landed:
                outcomes |= each
            return [_scores([outcomes[key] for key in each]) for each in keys]

        return mapped(joined([flight.future for flight in flights]), scores)

    def _start(self, flight: _Flight, requests: Sequence[ScoreRequest], keys: Sequence[Sequence[bytes]]) -> None:
        """Have the scorer compute what a flight is for."""
        wanted = set(flight.keys)
        places = [[i for i, key in enumerate(each) if key in wanted] for each in keys]
        parts = [
            (
                ScoreRequest(request.query, [request.texts[i] for i in chosen], request.instruction),
                [each[i] for i in chosen],
            )
            for request, each, chosen in zip(requests, keys, places, strict=True)
            if chosen
        ]
        inner = Call([request for request, _ in parts])
        flight.cancel = inner.cancel
        if flight.given_up:
            inner.cancel()

        def land(done: Future[list[Scores]]) -> None:
            try:
                found = done.result()
            except BaseException as exc:
                self._fail(flight, exc)
            else:
                outcomes: dict[bytes, Outcome] = {}
                for (_, names), scores in zip(parts, found, strict=True):
                    outcomes |= _outcomes(names, scores)
                self._land(flight, outcomes)

        try:
            future = self._scorer._begin(inner)
        except BaseException as exc:
            self._fail(flight, exc)
            raise
        future.add_done_callback(land)

    def prepare(self, request: ScoreRequest) -> Prepared:
        """Return a request of which only what the cache does not know is made ready."""
        keys = self._keys(request)
        known = self.cache.get(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        texts = [request.texts[i] for i in missing]
        inner = self._scorer.prepare(ScoreRequest(request.query, texts, request.instruction)) if texts else None
        return _CachedPrompts(self, keys, known, missing, inner)

    def _claim(self, keys: Sequence[bytes]) -> tuple[dict[bytes, KeptScore], _Flight | None, list[_Flight]]:
        """Return what is known, a flight for what nobody computes yet, and the flights that compute the rest."""
        return self._take_off(keys, self.cache.get(keys))

    def _take_off(
        self, keys: Sequence[bytes], known: dict[bytes, KeptScore]
    ) -> tuple[dict[bytes, KeptScore], _Flight | None, list[_Flight]]:
        with self._lock:
            # Once more, in memory: a flight may have landed since.
            missing = [key for key in keys if key not in known]
            known |= self.cache.peek(missing)
            others = {id(flight): flight for key in missing if (flight := self._flights.get(key)) is not None}
            for flight in others.values():
                flight.waiting += 1
            mine = [key for key in missing if key not in known and key not in self._flights]
            own = _Flight(mine) if mine else None
            if own is not None:
                self._flights |= dict.fromkeys(mine, own)
        return known, own, list(others.values())

    def _leave(self, flight: _Flight) -> None:
        """Wait no longer; the last one gives the computation up."""
        with self._lock:
            flight.waiting -= 1
            if flight.waiting or flight.future.done():
                return
            flight.given_up = True
            self._forget(flight)
        flight.cancel()

    def _land(self, flight: _Flight, outcomes: dict[bytes, Outcome]) -> None:
        try:
            self.cache.put({key: kept for key, kept in outcomes.items() if isinstance(kept, KeptScore)})
        except Exception:  # of a cache of others: what was computed is right, and somebody waits for it
            logger.exception("the score cache cannot keep scores.")
        finally:
            with self._lock:
                self._forget(flight)
            flight.future.set_result(outcomes)

    def _fail(self, flight: _Flight, error: BaseException) -> None:
        with self._lock:
            self._forget(flight)
        cancelled = not isinstance(error, Exception) or flight.given_up
        flight.future.set_exception(ScorerError("the call was cancelled.") if cancelled else error)

    def _forget(self, flight: _Flight) -> None:
        """Take a flight out of sight; holds the lock."""
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]


class _CachedPrompts(Prepared):
    """A request of which a part is known; a slice computes what is still missing when it is scored.

    What is known costs nothing: its `tokens` are those that all prompts share.
    """

    def __init__(
        self,
        scorer: CachedScorer,
        keys: Sequence[bytes],
        known: Mapping[bytes, KeptScore],
        missing: Sequence[int],
        inner: Prepared | None,
    ) -> None:
        self.shared_tokens = 0 if inner is None else inner.shared_tokens
        self.tokens = np.full(len(keys), self.shared_tokens, dtype=np.int32)
        if inner is not None:
            self.tokens[list(missing)] = inner.tokens
        self._cached = scorer
        self._keys = keys
        self._known = known  # held here: others may push it out of the cache before a slice is scored
        self._inner = inner
        self._place = {keys[i]: place for place, i in enumerate(missing)}  # in the inner request

    async def ascore(self, start: int, stop: int) -> Scores:
        """Return what came of a slice; a cancelled wait gives up what nobody else waits for."""
        scorer, keys = self._cached, self._keys[start:stop]
        wanted = [key for key in keys if key in self._place]
        known, own, others = scorer._take_off(wanted, {})
        flights = [*others, *([own] if own else [])]
        try:
            if own is not None:
                task = asyncio.ensure_future(self._compute(own))
                loop = asyncio.get_running_loop()
                own.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            outcomes: dict[bytes, Outcome] = {**self._known, **known}
            for flight in flights:
                landed: dict[bytes, Outcome] = await asyncio.shield(asyncio.wrap_future(flight.future))
                outcomes |= landed
        except BaseException:
            for flight in flights:
                scorer._leave(flight)
            raise
        return _scores([outcomes[key] for key in keys])

    async def _compute(self, flight: _Flight) -> None:
        """Compute a flight's scores, run by run of neighbours."""
        outcomes: dict[bytes, Outcome] = {}
        places = enumerate(sorted((self._place[key], key) for key in flight.keys))
        try:
            for _, run in groupby(places, key=lambda item: item[1][0] - item[0]):
                chosen = [at for _, at in run]
                first, last = chosen[0][0], chosen[-1][0]
                if self._inner is None:
                    raise ScorerError("nothing was made ready.")
                outcomes |= _outcomes([key for _, key in chosen], await self._inner.ascore(first, last + 1))
        except BaseException as exc:
            self._cached._fail(flight, exc)
            if not isinstance(exc, Exception):
                raise
        else:
            self._cached._land(flight, outcomes)


def open_cache(cache: ScoreCache | str | os.PathLike[str] | int) -> ScoreCache:
    """Return the cache that a path or a number of scores describes.

    Raises:
        InvalidInputError: If the number is below 1, or the file cannot be used.
    """
    if isinstance(cache, ScoreCache):
        return cache
    return ScoreCache(size=check_count("cache", cache)) if isinstance(cache, int) else ScoreCache(cache)


def cache_named(text: str | None) -> Path | int | None:
    """Return what a command line names a cache by: a file, whose `~` is the home folder, or a number of scores.

    Raises:
        InvalidInputError: If it looks like a number and is none above 0.
    """
    if not text:
        return None
    if text.isascii() and text.isdecimal() and int(text):
        return int(text)
    if re.fullmatch(r"[-+]?[\d.,_]+", text):
        raise InvalidInputError(f"cache must be a file or how many scores to keep, such as 100000, not {text!r}.")
    return Path(text).expanduser()


def _outcomes(keys: Sequence[bytes], scores: Scores) -> dict[bytes, Outcome]:
    """Return what came of each key's document."""
    return {
        key: scores.errors[i]
        if i in scores.errors
        else KeptScore(float(scores.log_odds[i]), int(scores.tokens[i]), int(scores.kept_chars[i]))
        for i, key in enumerate(keys)
    }


def _scores(outcomes: Sequence[Outcome]) -> Scores:
    """Return what came of a request's documents as one value."""
    failed = KeptScore(float("nan"))
    kept = [failed if isinstance(outcome, Exception) else outcome for outcome in outcomes]
    return Scores(
        np.array([each.log_odds for each in kept], dtype=np.float32),
        np.array([each.tokens for each in kept], dtype=np.int32),
        np.array([each.kept_chars for each in kept], dtype=np.int32),
        {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Exception)},
    )
