"""Shut down under load, again and again: is every request that the server took answered?

Half of the clients keep their connection, half open one for each request. A request counts as taken where it was sent
before the signal, or where the server's log has it; one that is taken and gets no whole answer is lost. A client that
comes later is refused with 503, or finds no server any more, and can try elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from eval.serving.load import Connection, Question, Reply, percentiles_ms, question
from tests.serve.process import ServerProcess, stub_server

N_CLIENTS = 16
SERVICE_S = 0.01


@dataclass(frozen=True, slots=True)
class Shutdown:
    """One server's end."""

    fates: Counter[str]
    exit_status: int
    seconds: float


def measure(*, n_shutdowns: int) -> dict[str, Any]:
    """Shut `n_shutdowns` servers down, each at a random moment of its load."""
    chance = random.Random(50)
    ends = [_shut_down(chance) for _ in range(n_shutdowns)]
    fates: Counter[str] = sum((end.fates for end in ends), Counter())
    return {
        "shutdowns": n_shutdowns,
        "clients": N_CLIENTS,
        **{name: fates[name] for name in ("answered", "answered_after_the_signal", "refused", "not_taken")},
        "lost": fates["lost"],
        "wrong": fates["wrong"],
        "exit_statuses": dict(Counter(str(end.exit_status) for end in ends)),
        "signal_to_exit_ms": percentiles_ms([end.seconds for end in ends]),
        "met": not fates["lost"]
        and not fates["wrong"]
        and fates["answered_after_the_signal"] >= n_shutdowns  # else there was nothing to lose
        and all(end.exit_status == 0 for end in ends),
    }


def _shut_down(chance: random.Random) -> Shutdown:
    with stub_server("Slow", arguments=[SERVICE_S]) as server:
        asked, signalled_at = asyncio.run(_load(server, chance.uniform(0.3, 1.2)))
        exit_status = server.process.wait(60)
        seconds = time.perf_counter() - signalled_at
    logged = {event.get("request_id") for event in server.events if event.get("message") == "request"}
    fates = Counter(_fate(own, reply, signalled_at, taken=own.id in logged) for own, reply in asked)
    fates["answered_after_the_signal"] = sum(
        reply.status == 200 and reply.sent_at < signalled_at < reply.done_at for _, reply in asked
    )
    return Shutdown(fates, exit_status, seconds)


async def _load(server: ServerProcess, seconds: float) -> tuple[list[tuple[Question, Reply]], float]:
    """Ask until the server is gone; return what came back, and when the signal was sent."""
    asked: list[tuple[Question, Reply]] = []
    gone = asyncio.Event()

    async def client(number: int) -> None:
        connection, chance = Connection(server.port), random.Random(number)
        while not gone.is_set():
            own = question(f"c{number}-{len(asked)}", chance, n_documents=3, close=number % 2 == 0)
            reply = await connection.ask(own)
            asked.append((own, reply))
            await asyncio.sleep(0.005 if reply.status != 200 else 0)
        connection.close()

    clients = [asyncio.create_task(client(number)) for number in range(N_CLIENTS)]
    await asyncio.sleep(seconds)
    signalled_at = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    while server.process.poll() is None:
        await asyncio.sleep(0.01)
    gone.set()
    await asyncio.gather(*clients)
    return asked, signalled_at


def _fate(own: Question, reply: Reply, signalled_at: float, *, taken: bool) -> str:
    if reply.status == 200:
        return "answered" if own.is_answered_by(reply) else "wrong"
    if reply.status == 503 and json.loads(reply.body)["error"]["code"] == "not_ready":
        return "refused"  # before anything was done for it
    return "lost" if taken or reply.received or reply.sent_at < signalled_at else "not_taken"
