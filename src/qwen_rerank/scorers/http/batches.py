"""One request: built, sent, split where it is too large, and its answer checked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_rerank.errors import BackendRejectedError, ProtocolError
from qwen_rerank.scorers.http.answers import Answer, Reading, broken, parse
from qwen_rerank.scorers.http.config import HttpConfig
from qwen_rerank.scorers.http.dialects.base import Ask
from qwen_rerank.scorers.http.dialects.token_routes import Labels
from qwen_rerank.scorers.http.session import Session, encode_json
from qwen_rerank.scorers.http.transport import Transport

_LIMIT = re.compile(r"batch size \d+ > maximum allowed batch size (\d+)")


@dataclass(frozen=True, slots=True)
class Unit:
    """One document of one query: as ids of its whole prompt, or as texts."""

    job: int
    place: int
    ids: list[int] | None = None
    query: str = ""
    text: str = ""
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one request holds: any prompts, or texts of one query."""

    units: list[Unit]


@dataclass(slots=True)
class BatchRunner:
    """Sends the batches of one call.

    Attributes:
        transport: Sends.
        session: What is known of the server.
        config: What the user asked for.
        warn: Says something once.
        deadline: Time of the loop's clock for all batches, or None for `timeout_s` each.
        timeout_s: Seconds of one request where there is no common deadline.
    """

    transport: Transport
    session: Session
    config: HttpConfig
    warn: Callable[[str], None]
    deadline: float | None
    timeout_s: float

    async def run(self, batch: Batch) -> Reading:
        """Return the scores of the batch, in its order."""
        if len(batch.units) > self.session.max_batch:
            return await self._split(batch, self.session.max_batch)
        body = encode_json(self._body(batch))
        try:
            answer = await self.transport.post(self.session.path, body, deadline=self._deadline())
        except BackendRejectedError as exc:
            limit = _lower_limit(exc, len(batch.units))
            if limit is None:
                raise
            self.session.max_batch = min(self.session.max_batch, limit)
            return await self._split(batch, limit)
        return self._checked(answer, batch)

    def _deadline(self) -> float:
        return self.deadline if self.deadline is not None else asyncio.get_running_loop().time() + self.timeout_s

    async def _split(self, batch: Batch, size: int) -> Reading:
        units = batch.units
        parts = [Batch(units[start : start + size]) for start in range(0, len(units), size)]
        outcomes = await asyncio.gather(*(self.run(part) for part in parts), return_exceptions=True)
        failed = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
        if failed is not None:
            raise failed
        readings = [outcome for outcome in outcomes if isinstance(outcome, Reading)]
        counts = [reading.prompt_tokens for reading in readings]
        known = [count for count in counts if count is not None]
        return Reading(
            np.concatenate([reading.scores for reading in readings]), sum(known) if len(known) == len(counts) else None
        )

    def _body(self, batch: Batch) -> dict[str, Any]:
        session = self.session
        if session.route is not None:
            prompts = [unit.ids for unit in batch.units if unit.ids is not None]
            return session.route.body(prompts, self._labels(), model=self.config.model)
        first = batch.units[0]
        return session.dialect.body(
            Ask(
                query=first.query,
                documents=[unit.text for unit in batch.units],
                model=self.config.model,
                instruction=first.instruction,
                logits=session.logits,
            )
        )

    def _labels(self) -> Labels:
        encoder = self.session.encoder
        return Labels(encoder.yes_id, encoder.no_id) if encoder is not None else Labels(0, 0)

    def _checked(self, answer: Answer, batch: Batch) -> Reading:
        session, n = self.session, len(batch.units)
        payload = parse(answer)
        if session.route is not None:
            reading = session.route.read(answer, payload, n, self._labels())
            sent = sum(len(unit.ids or ()) for unit in batch.units)
            if reading.prompt_tokens not in (None, sent):
                broken(answer, f"scores of {reading.prompt_tokens} tokens where {sent} were sent")
        else:
            reading = session.dialect.read(answer, payload, n)
            self._check_echoes(answer, reading, batch)
        self._check_range(answer, reading)
        self._check_model(answer, reading)
        return reading

    def _check_range(self, answer: Answer, reading: Reading) -> None:
        if self.session.kind in ("probability", "relevance") and not np.all(
            (reading.scores >= 0) & (reading.scores <= 1)
        ):
            broken(
                answer, "scores outside 0 to 1 where probabilities are expected (scores='logit' takes them as logits)"
            )

    def _check_echoes(self, answer: Answer, reading: Reading, batch: Batch) -> None:
        for place, text in reading.echoes.items():
            if text != batch.units[place].text:
                self._object(answer, f"the text of document {place} changed")
                return

    def _check_model(self, answer: Answer, reading: Reading) -> None:
        asked = self.config.model
        if asked is not None and reading.model is not None and reading.model != asked:
            self._object(answer, f"scores of the model {reading.model!r:.80} where {asked!r} was asked for")

    def _object(self, answer: Answer, what: str) -> None:
        if self.config.strict_echo:
            raise ProtocolError(f"{answer.url} answered with {what}.", url=answer.url, status=answer.status)
        self.warn(f"{answer.url} answered with {what}; strict_echo=True makes this an error.")


def _lower_limit(exc: BackendRejectedError, n: int) -> int | None:
    """Return how many documents to send at once after a refusal, or None if it is not about the number of documents."""
    told = _LIMIT.search(str(exc))
    too_large = exc.status == 413 or (exc.status in (400, 422) and "batch" in str(exc).lower())
    if n == 1 or not too_large:
        return None
    limit = int(told.group(1)) if told else n // 2
    return max(1, min(limit, n // 2 if limit >= n else limit))
