"""Scorers that behave in a chosen way, and texts whose right score is known to whoever sent them."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen_rerank.errors import NonFiniteScoreError, ScorerError
from qwen_rerank.scorers.base import Arguments, BaseScorer, ScoreRequest
from qwen_rerank.types import Fit, Scores

MAX_LENGTH = 100
SECRET = "secret " + "detail of a bug"
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{0,30})?")


def value_of(text: str) -> float:
    """The log-odds that `Oracle` gives: the number at the text's end, else its length."""
    last = text.rpartition(" ")[2]
    return float(last) if _NUMBER.fullmatch(last) else len(text) / 1000


class Oracle(BaseScorer):
    """Gives every text the number it ends with. Words are tokens; ten of a prompt's hundred are its frame."""

    max_length = MAX_LENGTH

    def __init__(self) -> None:
        self.name = "oracle"
        self.fingerprint = "oracle"
        self.scored: list[str] = []
        self.instructions: list[str | None] = []

    def _compute(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        return [self._one(request) for request in requests]

    def _one(self, request: ScoreRequest) -> Scores:
        self.scored += request.texts
        self.instructions.append(request.instruction)
        log_odds = np.array([self.value_of(text) for text in request.texts], dtype=np.float32)
        fits = self._measure(request.query, request.texts, request.instruction)
        tokens = np.array([MAX_LENGTH - fit.room + min(fit.tokens, fit.room) for fit in fits], dtype=np.int32)
        return Scores(log_odds, tokens, np.array([fit.kept_chars for fit in fits], dtype=np.int32))

    def value_of(self, text: str) -> float:
        return value_of(text)

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        room = MAX_LENGTH - 10 - len(query.split())
        fits = []
        for text in texts:
            words = text.split()
            kept = len(text) if len(words) <= room else len(" ".join(words[:room]))
            fits.append(Fit(tokens=len(words), room=room, kept_chars=kept))
        return fits


class Slow(Oracle):
    """One device that takes its time: `seconds` a call, one call at a time, and a cancelled call does not count.

    Args:
        seconds: A call's time.
        seconds_per_document: Further time for each document.
    """

    def __init__(self, seconds: float = 0.0, *, seconds_per_document: float = 0.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._per_document = seconds_per_document
        self._device = asyncio.Lock()

    async def arun(self, arguments: Arguments) -> list[Scores]:
        n_documents = sum(len(row.texts) for row in arguments.rows)
        async with self._device:
            await asyncio.sleep(self._seconds + self._per_document * n_documents)
            return self.run(arguments)


class Gated(Oracle):
    """Waits in every asynchronous call until `gate` is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.waiting = 0

    async def arun(self, arguments: Arguments) -> list[Scores]:
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        return self.run(arguments)


class FileGated(Oracle):
    """Waits in every asynchronous call until a file exists; for servers in another process."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    async def arun(self, arguments: Arguments) -> list[Scores]:
        while not self._path.exists():
            await asyncio.sleep(0.005)
        return self.run(arguments)


class Stepped(Oracle):
    """Finishes one call, in order of arrival, each time `steps` is released."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = asyncio.Semaphore(0)

    async def arun(self, arguments: Arguments) -> list[Scores]:
        await self.steps.acquire()
        return self.run(arguments)


class Faulty(Oracle):
    """Fails on the texts that ask for it: "poison" raises, "nan" gives NaN, "fail ..." fails with a given error."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self._error = error or ScorerError("this text is poison")

    def _one(self, request: ScoreRequest) -> Scores:
        if "explode" in request.texts:
            raise RuntimeError(SECRET)
        scores = super()._one(request)
        failures = {"poison": self._error, "nan": NonFiniteScoreError("the model gave nan for this document.")}
        errors = {index: failures[text] for index, text in enumerate(request.texts) if text in failures}
        scores.log_odds[list(errors)] = np.nan
        return replace(scores, errors=errors)


class Hung(Oracle):
    """Answers the self check, then never again."""

    def __init__(self) -> None:
        super().__init__()
        self._never = threading.Event()

    async def arun(self, arguments: Arguments) -> list[Scores]:
        await asyncio.to_thread(self._never.wait)
        raise AssertionError("unreachable")


class Frozen(Oracle):
    """Answers "frozen" with the number of objects that its process's garbage collector leaves alone."""

    def value_of(self, text: str) -> float:
        return gc.get_freeze_count() if text == "frozen" else value_of(text)


def slow_load(seconds: float) -> Oracle:
    """Load for a while."""
    time.sleep(seconds)
    return Oracle()


class Constant(Oracle):
    """Gives every pair the same score, as a server does whose template dropped query and document."""

    def value_of(self, text: str) -> float:
        return -8.9
