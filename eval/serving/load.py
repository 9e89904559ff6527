"""Requests whose right answers only their client knows, and a client light enough to load a server from one core."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """A request and the answer that it must get from a scorer that gives every text the number it ends with."""

    id: str
    values: list[float]
    data: bytes

    def is_answered_by(self, reply: Reply) -> bool:
        """Whether the reply is this question's own answer, to the last score."""
        if reply.status != 200 or reply.request_id != self.id:
            return False
        order = sorted(range(len(self.values)), key=lambda i: -self.values[i])
        results = json.loads(reply.body)["results"]
        return [result["index"] for result in results] == order and all(
            math.isclose(result["relevance_score"], self.values[i], abs_tol=1e-5)
            for result, i in zip(results, order, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; `status` is 0 where the connection ended without a whole answer.

    Attributes:
        sent_at: `time.perf_counter()` when the request was sent.
        done_at: The same, when the answer was complete.
        received: Whether any byte of an answer came.
    """

    status: int
    sent_at: float
    done_at: float
    request_id: str = ""
    retry_after: str = ""
    body: bytes = b""
    received: bool = False

    @property
    def seconds(self) -> float:
        """From sending to the whole answer."""
        return self.done_at - self.sent_at


def question(label: str, chance: random.Random, *, n_documents: int, words: int = 40, close: bool = False) -> Question:
    """Return a question with `n_documents` of about `words` words; `close` asks for a connection of its own."""
    values = [round(chance.uniform(-9, 9), 3) for _ in range(n_documents)]
    documents = [f"{label} {'word ' * chance.randint(words // 2, words + words // 2)}{value}" for value in values]
    body = json.dumps({"query": f"question {label}", "documents": documents, "raw_scores": True}).encode()
    head = (
        f"POST /v1/rerank HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\nx-request-id: {label}\r\n"
        f"content-length: {len(body)}\r\n{'connection: close' + chr(13) + chr(10) if close else ''}\r\n"
    )
    return Question(label, values, head.encode() + body)


class Connection:
    """One connection, opened when first used, kept as long as the server keeps it; one question at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> None:
        """Connect unless connected.

        Raises:
            OSError: If the server takes no connection.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)

    async def ask(self, question: Question) -> Reply:
        """Return what comes back; never raises."""
        sent_at = time.perf_counter()
        head = b""
        try:
            await self.open()
            assert self._streams is not None
            reader, writer = self._streams
            writer.write(question.data)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                fields = _fields(head)
                body = await reader.readexactly(int(fields["content-length"]))
        except (OSError, EOFError, TimeoutError) as exc:
            self.close()
            received = bool(head) or (isinstance(exc, asyncio.IncompleteReadError) and bool(exc.partial))
            return Reply(0, sent_at, time.perf_counter(), received=received)
        if fields.get("connection") == "close":
            self.close()
        return Reply(
            status=int(head.split(b" ", 2)[1]),
            sent_at=sent_at,
            done_at=time.perf_counter(),
            request_id=fields.get("x-request-id", ""),
            retry_after=fields.get("retry-after", ""),
            body=body,
            received=True,
        )

    def close(self) -> None:
        """Close the connection; the next question opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Pool:
    """As many connections as are in use at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection."""
        connection = self._idle.pop() if self._idle else Connection(self._port)
        try:
            yield connection
        finally:
            self._idle.append(connection)

    def close(self) -> None:
        """Close those that are not lent."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 99th percentile and largest value in milliseconds; empty where there is nothing."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    at = {"p50": ordered[len(ordered) // 2], "p99": ordered[math.ceil(0.99 * len(ordered)) - 1], "max": ordered[-1]}
    return {name: round(1e3 * value, 2) for name, value in at.items()}


def memory_mib(pid: int) -> dict[str, float]:
    """Return a process's memory now and at its peak, in MiB; empty where the system does not tell."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
        found = {"now": lines["VmRSS"], "peak": lines["VmHWM"]}
    return {name: round(int(value.split()[0]) / 1024, 1) for name, value in found.items()}


def _fields(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
