"""Scorers that behave in a chosen way, and texts whose right score is known to whoever sent them."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_rerank.errors import DocumentScoringError, NonFiniteScoreError, ScorerError
from qwen_rerank.threaded import ThreadedScorer
from qwen_rerank.types import Fit

MAX_LENGTH = 100
SECRET = "secret " + "detail of a bug"
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{0,30})?")


def value_of(text: str) -> float:
    """The log-odds that `Oracle` gives: the number at the text's end, else its length."""
    last = text.rpartition(" ")[2]
    return float(last) if _NUMBER.fullmatch(last) else len(text) / 1000


class Oracle(ThreadedScorer):
    """Gives every text the number it ends with. Words are tokens; ten of a prompt's hundred are its frame."""

    def __init__(self) -> None:
        self.name = "oracle"
        self.fingerprint = "oracle"
        self.max_length = MAX_LENGTH
        self.scored: list[str] = []
        self.instructions: list[str | None] = []

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        self.scored += documents
        self.instructions.append(instruction)
        return np.array([value_of(text) for text in documents], dtype=np.float32)

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        room = self.max_length - 10 - len(query.split())
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

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        async with self._device:
            await asyncio.sleep(self._seconds + self._per_document * len(documents))
            return self.score(query, documents, instruction=instruction)


class Gated(Oracle):
    """Waits in every asynchronous call until `gate` is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.waiting = 0

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        return self.score(query, documents, instruction=instruction)


class FileGated(Oracle):
    """Waits in every asynchronous call until a file exists; for servers in another process."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        while not self._path.exists():
            await asyncio.sleep(0.005)
        return self.score(query, documents, instruction=instruction)


class Stepped(Oracle):
    """Finishes one call, in order of arrival, each time `steps` is released."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = asyncio.Semaphore(0)

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        await self.steps.acquire()
        return self.score(query, documents, instruction=instruction)


class Faulty(Oracle):
    """Fails on the texts that ask for it: "poison" raises, "nan" gives NaN, "fail ..." fails with a given error."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self._error = error or ScorerError("this text is poison")

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        if "explode" in documents:
            raise RuntimeError(SECRET)
        scores = super().score(query, documents, instruction=instruction)
        failed: dict[int, Exception] = {}
        for index, text in enumerate(documents):
            if text == "poison":
                failed[index] = self._error
            elif text == "nan":
                failed[index] = NonFiniteScoreError("the model gave nan for this document.")
        if failed:
            scores[list(failed)] = np.nan
            raise DocumentScoringError(failed, scores)
        return scores


class Hung(Oracle):
    """Answers the self check, then never again."""

    def __init__(self) -> None:
        super().__init__()
        self._never = threading.Event()

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        await asyncio.to_thread(self._never.wait)
        raise AssertionError("unreachable")


class Frozen(Oracle):
    """Answers "frozen" with the number of objects that its process's garbage collector leaves alone."""

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        values = [gc.get_freeze_count() if text == "frozen" else value_of(text) for text in documents]
        return np.array(values, dtype=np.float32)


def slow_load(seconds: float) -> Oracle:
    """Load for a while."""
    time.sleep(seconds)
    return Oracle()


class Constant(Oracle):
    """Gives every pair the same score, as a server does whose template dropped query and document."""

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        return np.full(len(documents), -8.9, dtype=np.float32)
