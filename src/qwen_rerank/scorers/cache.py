"""Scores that were computed before: in memory, by option in a file, and a scorer that asks there first."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError, ScorerError
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.protocols import FingerprintedScorer, SimpleScorer
from qwen_rerank.scorers.adapted import AdaptedScorer, as_scorer
from qwen_rerank.scorers.base import BaseScorer, Call, Prepared, ScoreRequest, joined, mapped
from qwen_rerank.sharing import SharedCopies, made_from, renew_in_child
from qwen_rerank.types import Fit, Scores

logger = logging.getLogger(__name__)

_DEFAULT_SIZE = 100_000  # scores in memory, about 300 bytes each
_FILE_SIZE = 5_000_000  # scores in the file, about 100 bytes each
_BATCH = 500  # below SQLite's oldest limit on the variables of one statement
_PATIENCE_S = 5.0  # how long another process may write
_APPLICATION_ID = 0x51525343  # "QRSC", in the file's header: what has it may be deleted by us
_APPLICATION_ID_AT = 68
_TABLE = "kept_scores"


class KeptScore(NamedTuple):
    """What is kept of one document.

    Attributes:
        log_odds: Log-odds of relevance.
        tokens: Prompt tokens that were read; -1 where nobody can tell.
        kept_chars: Characters of the document that were read; -1 where nobody can tell.
    """

    log_odds: float
    tokens: int = -1
    kept_chars: int = -1


class ScoreCache(SharedCopies):
    """Scores by a hash of everything that decides them; texts are never kept. Thread-safe.

    The least recently used go first. A file may be deleted at any time and shared by several processes; a damaged one is
    dropped with a warning, and a row that does not match its checksum is not there.

    Args:
        path: SQLite file; made if it is not there. None keeps scores in memory alone.
        size: Scores in memory.

    Attributes:
        hits: Scores that were found.
        misses: Scores that were not.

    Raises:
        InvalidInputError: If the file is something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, size: int = _DEFAULT_SIZE) -> None:
        self._size = check_count("size", size)
        self._memory: OrderedDict[bytes, KeptScore] = OrderedDict()
        self._lock = threading.RLock()
        self._file = None if path is None else Path(path)
        self._db = None if self._file is None else _open(self._file)
        self._parents: sqlite3.Connection | None = None
        self.hits = self.misses = 0
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child: take a lock and a connection of its own; SQLite's must not cross a fork, not even to be closed."""
        self._lock = threading.RLock()
        self._parents, self._db = self._db, None
        if self._parents is not None and self._file is not None:
            try:
                self._db = _connect(self._file)
            except sqlite3.Error as exc:
                logger.warning("the score cache %s cannot be used in this process (%s).", self._file, exc)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle path and size; what is in memory stays here."""
        path = None if self._file is None else str(self._file.absolute())
        return made_from, (type(self), {"path": path, "size": self._size})

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what is in memory stays."""
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    def __len__(self) -> int:
        """Return how many scores are in memory."""
        return len(self._memory)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, KeptScore]:
        """Return key to score of those that are known."""
        with self._lock:
            found = self.peek(keys)
            missing = [key for key in keys if key not in found]
            if missing and self._db is not None:
                read = self._guarded(lambda db: _read(db, missing)) or {}
                self._remember(read)
                found |= read
            self.hits += len(found)
            self.misses += len(keys) - len(found)
        return found

    def peek(self, keys: Iterable[bytes]) -> dict[bytes, KeptScore]:
        """Return those that are known in memory, uncounted."""
        with self._lock:
            found = {key: self._memory[key] for key in keys if key in self._memory}
            for key in found:
                self._memory.move_to_end(key)
        return found

    def put(self, scores: Mapping[bytes, KeptScore]) -> None:
        """Keep scores."""
        if not scores:
            return
        with self._lock:
            self._remember(scores)
            self._guarded(lambda db: _write(db, scores))

    def _remember(self, scores: Mapping[bytes, KeptScore]) -> None:
        self._memory.update(scores)
        while len(self._memory) > self._size:
            self._memory.popitem(last=False)

    def _guarded(
        self, work: Callable[[sqlite3.Connection], dict[bytes, KeptScore] | None]
    ) -> dict[bytes, KeptScore] | None:
        """Do something with the file; where it cannot be done the scores are computed, never guessed."""
        if self._db is None or self._file is None:
            return None
        try:
            return work(self._db)
        except sqlite3.OperationalError as exc:  # held by another process, a full disk
            logger.warning("the score cache %s cannot be used now (%s).", self._file, exc)
        except sqlite3.Error as exc:
            logger.warning("the score cache %s is damaged (%s) and is dropped.", self._file, exc)
            self._db.close()
            self._db = _anew(self._file)
        return None


def score_key(fingerprint: str, instruction: str | None, query: str, text: str) -> bytes:
    """Return the key of one document's score: a hash over all that decides it, each part with its length."""
    digest = hashlib.blake2b(digest_size=24)
    for part in (fingerprint, instruction, query, text):
        data = b"" if part is None else part.encode("utf-8")
        digest.update(struct.pack("<q", -1 if part is None else len(data)))
        digest.update(data)
    return digest.digest()


def _open(file: Path) -> sqlite3.Connection:
    """Return the opened file; one of ours that is damaged is made anew.

    Raises:
        InvalidInputError: If it is something else, or cannot be had.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        ours = not file.exists() or _is_ours(file)
    except OSError as exc:
        raise InvalidInputError(f"{str(file)!r} cannot be used as a score cache ({exc}); name another file.") from exc
    if not ours:
        raise InvalidInputError(f"{str(file)!r} is no score cache; name another file, or delete it.")
    try:
        return _connect(file)
    except sqlite3.OperationalError as exc:
        raise InvalidInputError(
            f"{str(file)!r} cannot be used as a score cache ({exc}); wait for the process that uses it, or name another."
        ) from exc
    except sqlite3.Error as exc:
        logger.warning("the score cache %s is damaged (%s) and is made anew.", file, exc)
        return _anew(file)


def _is_ours(file: Path) -> bool:
    """Whether a file is empty or says in its header that it is a score cache."""
    with file.open("rb") as opened:
        head = opened.read(_APPLICATION_ID_AT + 4)
    return not head or head[_APPLICATION_ID_AT:] == struct.pack(">I", _APPLICATION_ID)


def _anew(file: Path) -> sqlite3.Connection:
    for name in (file, file.with_name(f"{file.name}-journal")):
        name.unlink(missing_ok=True)
    return _connect(file)


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, timeout=_PATIENCE_S, check_same_thread=False, isolation_level=None)
    try:
        # A crash may damage the file: that costs the scores, which can be computed again.
        db.execute("PRAGMA synchronous=OFF")
        if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {_TABLE} (place INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, "
            "log_odds REAL, tokens INTEGER, kept_chars INTEGER, checksum BLOB)"
        )
    except sqlite3.Error:
        db.close()
        raise
    return db


def _read(db: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, KeptScore]:
    found: dict[bytes, KeptScore] = {}
    for start in range(0, len(keys), _BATCH):
        part = list(keys[start : start + _BATCH])
        marks = ",".join("?" * len(part))
        rows = db.execute(
            f"SELECT key, log_odds, tokens, kept_chars, checksum FROM {_TABLE} WHERE key IN ({marks})", part
        )
        for key, log_odds, tokens, kept_chars, checksum in rows:
            score = KeptScore(log_odds, tokens, kept_chars)
            if _checksum(key, score) == checksum:
                found[key] = score
    return found


def _write(db: sqlite3.Connection, scores: Mapping[bytes, KeptScore]) -> None:
    rows = [(key, *score, _checksum(key, score)) for key, score in scores.items()]
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executemany(
            f"INSERT OR REPLACE INTO {_TABLE} (key, log_odds, tokens, kept_chars, checksum) VALUES (?, ?, ?, ?, ?)",
            rows,
        )
        # Places rise, so what is far behind the last one is the oldest.
        db.execute(f"DELETE FROM {_TABLE} WHERE place <= (SELECT max(place) FROM {_TABLE}) - ?", (_FILE_SIZE,))
        db.execute("COMMIT")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _checksum(key: bytes, score: KeptScore) -> bytes | None:
    """Return the checksum of a row; None, which no row has, where its values are of no such kind."""
    try:
        data = key + struct.pack("<dqq", *score)
    except (struct.error, TypeError):
        return b""
    return hashlib.blake2b(data, digest_size=8).digest()


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
        self, scorer: SimpleScorer | str, *, cache: ScoreCache | str | os.PathLike[str] | int = _DEFAULT_SIZE
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
        """What builds the scorer's prompts."""
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
        return _CachedPrompts(self, keys, missing, inner)

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
        self.cache.put({key: kept for key, kept in outcomes.items() if isinstance(kept, KeptScore)})
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
        self, scorer: CachedScorer, keys: Sequence[bytes], missing: Sequence[int], inner: Prepared | None
    ) -> None:
        self.shared_tokens = 0 if inner is None else inner.shared_tokens
        self.tokens = np.full(len(keys), self.shared_tokens, dtype=np.int32)
        if inner is not None:
            self.tokens[list(missing)] = inner.tokens
        self._cached = scorer
        self._keys = keys
        self._inner = inner
        self._place = {keys[i]: place for place, i in enumerate(missing)}  # in the inner request

    async def ascore(self, start: int, stop: int) -> Scores:
        """Return what came of a slice; a cancelled wait gives up what nobody else waits for."""
        scorer, keys = self._cached, self._keys[start:stop]
        wanted = [key for key in keys if key in self._place]
        hits = scorer.cache.peek(key for key in keys if key not in self._place)
        if len(hits) + len(wanted) < len(keys):  # pushed out of memory since; the file may have it
            hits |= await asyncio.to_thread(scorer.cache.get, [key for key in keys if key not in self._place])
        known, own, others = scorer._take_off(wanted, {})
        flights = [*others, *([own] if own else [])]
        try:
            if own is not None:
                task = asyncio.ensure_future(self._compute(own))
                loop = asyncio.get_running_loop()
                own.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            outcomes: dict[bytes, Outcome] = {**hits, **known}
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
