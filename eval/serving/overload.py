"""More requests than the engine can serve: what is still answered, and how soon is the rest refused?

The engine is a stub that takes `service_s` for each call and does nothing else, so the capacity is known to be the
engine's: four times of it is far below what the server's HTTP alone can take on the same machine (measured first), and
the figures tell of admission, not of the machine or of the load generator, whose own delay is reported beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.serving.load import Connection, Pool, Question, Reply, memory_mib, percentiles_ms, question
from tests.serve.process import ServerProcess, stub_server
from tests.serve.raw import read_one

N_DOCUMENTS = 10
CLOSED_LOOP_CLIENTS = 8  # as many as are let in however long they would wait (`patience_requests`)
OVERLOAD = 4.0
MIN_GOODPUT = 0.95  # of its peak
MIN_BUSY_GOODPUT = 0.9  # the same, beside busy processes
HEALTH_EVERY_S = 0.25
MAX_HEALTH_S = 2.0  # what a container's health check waits, or longer
MAX_REJECTION_MS = 50.0  # 99th percentile
MAX_RECOVERY_S = 2.0
MAX_REFUSAL_CPU_MS = 5.0
N_REFUSALS = 300


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that was due at `due_at`, and what became of it; times of `time.perf_counter()`."""

    question: Question
    due_at: float
    reply: Reply

    @property
    def seconds(self) -> float:
        """From when it was due, so that a late load generator counts against the server and not for it."""
        return self.reply.done_at - self.due_at


def measure(*, service_s: float, factors: tuple[float, ...], seconds: float, busy_processes: int = 0) -> dict[str, Any]:
    """Offer each multiple of the measured capacity for `seconds`, and see what comes back.

    Capacity and loads are measured under the same conditions, beside the same busy processes.

    Args:
        service_s: What one call of the stub engine takes.
        factors: Multiples of the capacity, ascending; the last is the overload.
        seconds: Length of each load; its first quarter, in which the queue fills, does not count.
        busy_processes: Processes that compute all the while and want a core each.
    """
    with _busy(busy_processes):
        found = _measure(service_s, factors, seconds)
    found = {"busy_processes": busy_processes, "refusal_cpu_ms": refusal_cpu_ms(), **found}
    return found | _verdict(found)


@contextlib.contextmanager
def _busy(n_processes: int) -> Iterator[None]:
    """Let processes compute for the length of a block."""
    code = "number = 0\nwhile True: number += 1"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(n_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _measure(service_s: float, factors: tuple[float, ...], seconds: float) -> dict[str, Any]:
    ceiling = _http_ceiling(seconds / 2)
    with stub_server("Slow", arguments=[service_s]) as server:
        before = memory_mib(server.process.pid)
        capacity = asyncio.run(_closed_loop(server.port, seconds))
        loads = [
            {"factor": factor, **asyncio.run(_offer(server.port, factor * capacity, seconds))} for factor in factors
        ]
        after = memory_mib(server.process.pid)
        exit_status = server.stop()
    return {
        "service_s": service_s,
        "http_ceiling_per_s": ceiling,
        "capacity_per_s": round(capacity, 2),
        "loads": loads,
        "server_mib_before": before.get("now"),
        "server_mib_peak": after.get("peak"),
        "exit_status": exit_status,
    }


def _verdict(found: dict[str, Any]) -> dict[str, Any]:
    loads = found["loads"]
    last = loads[-1]
    peak = max(load["goodput_per_s"] for load in loads)
    share = last["goodput_per_s"] / peak
    rejection_ms = last["rejected_ms"].get("p99", float("inf"))
    bars = {
        "answers": all(load["wrong"] == load["unanswered"] == load["without_retry_after"] == 0 for load in loads),
        "goodput": share >= (MIN_BUSY_GOODPUT if found["busy_processes"] else MIN_GOODPUT),
        # Beside busy processes the time on the clock is the machine's; what a refusal costs is said by its CPU time.
        "rejections": found["busy_processes"] > 0 or rejection_ms <= MAX_REJECTION_MS,
        "health": all(load["health_unanswered"] == 0 and load["health_asked"] > 0 for load in loads),
        "recovery": last["admitted_again_after_s"] <= MAX_RECOVERY_S,
        "refusal_cpu": max(found["refusal_cpu_ms"].values()) <= MAX_REFUSAL_CPU_MS,
    }
    return {
        "peak_goodput_per_s": peak,
        "goodput_at_overload_of_peak": round(share, 4),
        "rejected_p99_ms_at_overload": rejection_ms,
        "bars": bars,
        "met": all(bars.values()) and found["exit_status"] == 0,
    }


def refusal_cpu_ms() -> dict[str, float]:
    """Return the CPU time that the server's process takes for one refusal of each kind, on a connection that stays.

    The bodies that are refused as such have a hundred documents of some 250 characters, as an honest client's.
    """
    body = {"query": "q", "documents": ["word " * 50 + str(number) for number in range(100)]}
    many = {"query": "q", "documents": ["a"] * 1_001}
    key = "k" * 16
    right, wrong = f"Bearer {key}", "Bearer wrong"
    with stub_server(
        "Slow",
        ready=True,
        arguments=[3_600],
        settings={"max_queued_requests": 1, "patience_requests": 1},
        api_keys=[key],
    ) as server:
        held = socket.create_connection(("127.0.0.1", server.port))
        held.sendall(_refused(body, right))
        found = {
            "429, the queue is full": _cpu_ms(server, _refused(body, right), 429),
            "401, a wrong key": _cpu_ms(server, _refused(body, wrong), 401),
            "413, too many documents": _cpu_ms(server, _refused(many, right), 413),
            "422, a wrong document": _cpu_ms(server, _refused({**body, "documents": [1] * 100}, right), 422),
            "404, no such route": _cpu_ms(server, _refused(body, right, path="/nowhere"), 404),
        }
        held.close()
    with stub_server("slow_load", ready=False, arguments=[3_600], api_keys=[key]) as server:
        server.wait_for(message="loading")
        found["503, the model is loading"] = _cpu_ms(server, _refused(body, right), 503)
    return found


def _refused(body: dict[str, Any], authorization: str, *, path: str = "/v1/rerank") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\nauthorization: {authorization}\r\n"
    )
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def _cpu_ms(server: ServerProcess, request: bytes, status: int) -> float:
    """Return the mean of many refusals, one after another; the log line of each is in it."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        refuse = partial(_exchange, sock, request)
        for _ in range(10):
            if (answered := refuse()) != status:
                raise SystemExit(f"expected {status}, and the server answered {answered}.")
        before = _cpu_s(server.process.pid)
        for _ in range(N_REFUSALS):
            refuse()
        return round(1e3 * (_cpu_s(server.process.pid) - before) / N_REFUSALS, 2)


def _exchange(sock: socket.socket, request: bytes) -> int:
    sock.sendall(request)
    return read_one(sock).status


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _http_ceiling(seconds: float) -> float:
    """Return the requests per second that the server and this client manage with an engine that takes no time."""
    with stub_server("Oracle") as server:
        return round(asyncio.run(_closed_loop(server.port, seconds)), 1)


async def _closed_loop(port: int, seconds: float) -> float:
    """Return the requests per second of a few clients that always have one under way."""
    start = time.perf_counter()
    answered: list[float] = []

    async def client(number: int) -> None:
        connection, chance = Connection(port), random.Random(number)
        while time.perf_counter() < start + seconds:
            own = question(f"loop-{number}-{len(answered)}", chance, n_documents=N_DOCUMENTS)
            reply = await connection.ask(own)
            assert own.is_answered_by(reply), reply
            answered.append(reply.done_at)
        connection.close()

    await asyncio.gather(*map(client, range(CLOSED_LOOP_CLIENTS)))
    counted = [at for at in answered if start + seconds / 4 <= at <= start + seconds]
    return len(counted) / (0.75 * seconds)


async def _offer(port: int, rate: float, seconds: float) -> dict[str, Any]:
    """Send at random moments (Poisson), whether or not earlier requests are answered."""
    pool, chance = Pool(port), random.Random(int(1_000 * rate))
    asked: list[Asked] = []

    async def one(number: int, due_at: float) -> None:
        own = question(f"load-{number}", chance, n_documents=N_DOCUMENTS)
        async with pool.connection() as connection:
            asked.append(Asked(own, due_at, await connection.ask(own)))

    start = time.perf_counter()
    health: list[float] = []
    watching = asyncio.create_task(_watch_health(port, health))
    tasks, due_at = [], start
    while (due_at := due_at + chance.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(len(tasks), due_at)))
    watching.cancel()
    recovery = await _recover(port)
    await asyncio.gather(*tasks)
    pool.close()
    found = {
        "health_asked": len(health),
        "health_unanswered": sum(each > MAX_HEALTH_S for each in health),
        "health_ms": percentiles_ms([each for each in health if each <= MAX_HEALTH_S]),
    }
    return _summary(asked, start + seconds / 4, start + seconds) | found | recovery


async def _watch_health(port: int, seconds: list[float]) -> None:
    """Ask again and again, on a new connection as health checks do, whether the process answers."""
    while True:
        start = time.perf_counter()
        answered = False
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(MAX_HEALTH_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health/live HTTP/1.1\r\nhost: server\r\nconnection: close\r\n\r\n")
                answered = (await reader.read()).startswith(b"HTTP/1.1 200 ")
                writer.close()
        seconds.append(time.perf_counter() - start if answered else float("inf"))
        await asyncio.sleep(HEALTH_EVERY_S)


def _summary(asked: list[Asked], begin: float, end: float) -> dict[str, Any]:
    """Return the figures of the questions due, or for goodput answered, between two moments."""
    right = [one for one in asked if one.question.is_answered_by(one.reply)]
    due = [one for one in asked if begin <= one.due_at <= end]
    rejected = [one for one in due if one.reply.status == 429]
    return {
        "offered_per_s": round(len(due) / (end - begin), 1),
        "goodput_per_s": round(sum(begin <= one.reply.done_at <= end for one in right) / (end - begin), 2),
        "requests": len(asked),
        "answered": len(right),
        "rejected": sum(one.reply.status == 429 for one in asked),
        "wrong": sum(one.reply.status == 200 for one in asked) - len(right),
        "unanswered": sum(one.reply.status not in (200, 429) for one in asked),
        "without_retry_after": sum(one.reply.status == 429 and not one.reply.retry_after.isdigit() for one in asked),
        "answered_ms": percentiles_ms([one.seconds for one in due if one.reply.status == 200]),
        "rejected_ms": percentiles_ms([one.seconds for one in rejected]),
        "generator_late_ms": percentiles_ms([one.reply.sent_at - one.due_at for one in due]),
    }


async def _recover(port: int) -> dict[str, float]:
    """Say how long after the load a request is let in, and how long until the queue before it is worked off."""
    start = time.perf_counter()
    connection, chance = Connection(port), random.Random(0)
    reply = Reply(0, start, start)
    while reply.status != 200:
        reply = await connection.ask(question("after", chance, n_documents=N_DOCUMENTS))
        await asyncio.sleep(0.02 if reply.status != 200 else 0)
    connection.close()
    return {
        "admitted_again_after_s": round(reply.sent_at - start, 3),
        "queue_empty_after_s": round(reply.done_at - start, 3),
    }
