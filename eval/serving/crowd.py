"""Many clients at once: does each get exactly its own answer?"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from eval.serving.load import Connection, Question, Reply, memory_mib, percentiles_ms, question
from tests.serve.process import stub_server

SERVICE_S = 0.001  # short, so that the answers of many clients are under way in the server together


def measure(*, n_clients: int, n_rounds: int) -> dict[str, Any]:
    """Let `n_clients` connections ask `n_rounds` times each, all at the same moment, and check every answer."""
    settings = {"max_queue_wait_s": 1e6, "max_queued_requests": 2 * n_clients}
    with stub_server("Slow", arguments=[SERVICE_S], settings=settings) as server:
        before = memory_mib(server.process.pid)
        start = time.perf_counter()
        pairs = asyncio.run(_ask_all(server.port, n_clients, n_rounds))
        seconds = time.perf_counter() - start
        after = memory_mib(server.process.pid)
        exit_status = server.stop()
    n_right = sum(asked.is_answered_by(reply) for asked, reply in pairs)
    return {
        "clients": n_clients,
        "requests": len(pairs),
        "own_answer": n_right,
        "without_a_whole_answer": sum(reply.status == 0 for _, reply in pairs),
        "requests_per_s": round(len(pairs) / seconds, 1),
        "ms": percentiles_ms([reply.seconds for _, reply in pairs]),
        "server_mib_before": before.get("now"),
        "server_mib_peak": after.get("peak"),
        "exit_status": exit_status,
        "met": n_right == len(pairs) == n_clients * n_rounds and exit_status == 0,
    }


async def _ask_all(port: int, n_clients: int, n_rounds: int) -> list[tuple[Question, Reply]]:
    connections = [Connection(port) for _ in range(n_clients)]
    for connection in connections:
        await connection.open()

    async def client(number: int) -> list[tuple[Question, Reply]]:
        chance = random.Random(number)
        asked = []
        for turn in range(n_rounds):
            own = question(f"client-{number}-{turn}", chance, n_documents=chance.randint(1, 8))
            asked.append((own, await connections[number].ask(own)))
        connections[number].close()
        return asked

    answers = await asyncio.gather(*map(client, range(n_clients)))
    return [pair for pairs in answers for pair in pairs]
