"""Does the simulation tell what a real server does? Service times are measured alone, then loads are simulated and measured.

    python eval/serving/capacity.py [--requests 300] [--runs 5] [--out FILE] [--note TEXT]

The server is `qwen-rerank serve --model pocket --threads 1` on this machine, its clients share the other core. What the
simulation gets is measured before, while nothing waits: engine passes of 1, 2, 3 … requests without a server; what a
request takes at the server beyond its pass, right after another one and after a rest; and the CPU time that the server
takes for it beyond the pass, by which its Python holds up the passes of others. From these follow the capacity, of which
the loads are shares, and all waiting times. Measured and simulated requests come at the same random moments. Exits with 1
when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from eval.serving.load import Connection, Pool, percentiles_ms, question
from eval.speed.measure import hardware, versions
from qwen_rerank import load_scorer
from qwen_rerank.capacity import ServerTimes, poisson_arrivals, simulate
from qwen_rerank.scorers.base import ScoreRequest
from tests.serve.process import running

LOADS = (0.3, 0.6, 0.8)
N_DOCUMENTS = 10
CLIENTS = 8  # that never rest
RESTED = 60  # requests with a rest before each
WORDS = 40  # of a document, a half more or less
PASSES = 6  # up to so many requests in one
WITHIN = 0.2  # of the measured median and throughput
FRONT = 0.7  # share of what a request takes beyond its pass that comes before it: reading, checking, tokenizing


def asked(label: str, chance: random.Random) -> tuple[str, list[str]]:
    """Return query and documents of a question."""
    body = json.loads(question(label, chance, n_documents=N_DOCUMENTS, words=WORDS).data.partition(b"\r\n\r\n")[2])
    return body["query"], body["documents"]


def engine_times(repeats: int) -> tuple[list[list[float]], int]:
    """Return seconds of passes with 1, 2, 3 … requests, nothing else running, and how many requests fit one."""
    chance = random.Random(1)
    with load_scorer("pocket", device="cpu", threads=1) as scorer:
        seconds: list[list[float]] = [[] for _ in range(PASSES)]
        for turn in range(repeats + 3):  # the first ones warm up
            for n in range(1, PASSES + 1):
                pairs = [asked(f"pass-{turn}-{n}-{i}", chance) for i in range(n)]
                start = time.perf_counter()
                scorer.score_many([query for query, _ in pairs], [documents for _, documents in pairs])
                if turn >= 3:
                    seconds[n - 1].append(time.perf_counter() - start)
        tokens = []
        for i in range(20):
            prepared = scorer.prepare(ScoreRequest(*asked(f"size-{i}", chance)))
            tokens.append(prepared.shared_tokens + int((prepared.tokens - prepared.shared_tokens).sum()))
        return seconds, max(1, int(scorer.token_budget // statistics.mean(tokens)))


async def one_by_one(port: int, count: int) -> list[float]:
    """Return the seconds of requests that come one after another."""
    connection, chance = Connection(port), random.Random(2)
    replies = [
        await connection.ask(question(f"alone-{i}", chance, n_documents=N_DOCUMENTS, words=WORDS)) for i in range(count)
    ]
    connection.close()
    assert all(reply.status == 200 for reply in replies)
    return [reply.seconds for reply in replies[5:]]


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def others_cpu_s(server_pid: int) -> float:
    """Return the CPU seconds of all processes but the server and this one."""
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return busy - cpu_s(server_pid) - cpu_s(os.getpid())


async def without_rest(port: int, seconds: float) -> float:
    """Return the answers a second of a few clients that always have a request under way."""
    start, ends = time.perf_counter(), []

    async def client(number: int) -> None:
        connection, chance = Connection(port), random.Random(number)
        while time.perf_counter() < start + seconds:
            label = f"loop-{number}-{len(ends)}"
            reply = await connection.ask(question(label, chance, n_documents=N_DOCUMENTS, words=WORDS))
            assert reply.status == 200
            ends.append(reply.done_at)
        connection.close()

    await asyncio.gather(*map(client, range(CLIENTS)))
    return sum(start + seconds / 4 <= end <= start + seconds for end in ends) / (0.75 * seconds)


async def offer(port: int, arrivals: list[float], label: str) -> dict[str, Any]:
    """Send requests at given moments, whether or not earlier ones are answered; as `simulate` counts them."""
    pool, chance = Pool(port), random.Random(label)
    questions = [question(f"{label}-{i}", chance, n_documents=N_DOCUMENTS, words=WORDS) for i in range(len(arrivals))]
    ends: list[float] = [0.0] * len(arrivals)
    statuses = [0] * len(arrivals)
    late: list[float] = []

    async def one(i: int) -> None:
        async with pool.connection() as connection:
            reply = await connection.ask(questions[i])
        ends[i], statuses[i] = reply.done_at - start, reply.status

    start, tasks = time.perf_counter(), []
    for i, due in enumerate(arrivals):
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        late.append(time.perf_counter() - start - due)
        tasks.append(asyncio.create_task(one(i)))
    await asyncio.gather(*tasks)
    pool.close()
    first = len(arrivals) // 10
    seconds = [end - due for end, due, status in zip(ends, arrivals, statuses) if status == 200][first:]
    return {
        **percentiles_ms(seconds),
        "throughput_per_s": round(len(seconds) / (max(ends) - arrivals[first]), 3),
        "not_answered": sum(status != 200 for status in statuses),
        "client_late_ms": percentiles_ms(late),
    }


def measure(*, requests: int, runs: int) -> dict[str, Any]:
    """Return what was measured and simulated at each load."""
    passes, most = engine_times(repeats=20)
    pass_s = [statistics.mean(each) for each in passes]
    spread = [second / mean for each, mean in zip(passes, pass_s) for second in each]
    with running(["-m", "qwen_rerank", "serve", "--model", "pocket", "--threads", "1", "--port", "0"]) as server:
        asyncio.run(one_by_one(server.port, 30))
        alone = statistics.mean(asyncio.run(one_by_one(server.port, 65)))
        before = cpu_s(server.process.pid)
        rested = asyncio.run(offer(server.port, [4 * i * alone for i in range(RESTED)], "rested"))["p50"] / 1e3
        worked = (cpu_s(server.process.pid) - before) / RESTED
        saturated = asyncio.run(without_rest(server.port, 5.0))
        beyond = max(0.0, alone - pass_s[0])
        times = ServerTimes(
            pass_s=pass_s, front_s=FRONT * beyond, back_s=(1 - FRONT) * beyond, wake_s=max(0.0, rested - alone),
            held_s=max(0.0, worked - pass_s[0]), most_in_a_pass=most, spread=spread,
        )  # fmt: skip
        capacity = times.requests_per_s
        loads = []
        for load in LOADS:
            measured, simulated = [], []
            for run in range(runs):
                arrivals = poisson_arrivals(load * capacity, requests, seed=1000 * run + int(100 * load))
                before, start = others_cpu_s(server.process.pid), time.perf_counter()
                measured.append(asyncio.run(offer(server.port, arrivals.tolist(), f"load-{load}-{run}")))
                others = (others_cpu_s(server.process.pid) - before) / (time.perf_counter() - start)
                measured[-1]["cores_used_by_others"] = round(others, 3)
                simulated.append(simulate(arrivals, times, seed=run).as_dict())
            loads.append(compared(load, load * capacity, measured, simulated))
            print(line(loads[-1]), flush=True)
    return {
        "pass_ms": [round(1e3 * each, 3) for each in pass_s],
        "alone_ms": round(1e3 * alone, 3),
        "after_a_rest_ms": round(1e3 * rested, 3),
        "front_back_wake_held_ms": [
            round(1e3 * s, 3) for s in (times.front_s, times.back_s, times.wake_s, times.held_s)
        ],
        "most_in_a_pass": most,
        "cpu_ms": round(1e3 * worked, 3),
        "capacity_per_s": round(capacity, 2),
        "without_rest_per_s": {"measured": round(saturated, 2), "clients": CLIENTS},
        "requests": requests,
        "loads": loads,
        "met": all(all(load["bars"].values()) for load in loads),
    }


def compared(
    load: float, offered: float, measured: list[dict[str, Any]], simulated: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return both sides of one load and which bars are met."""

    def middle(runs: list[dict[str, Any]], name: str) -> float:
        return round(statistics.median(run[name] for run in runs), 3)

    p99 = [run["p99"] for run in measured]
    sides = {
        "measured": {name: middle(measured, name) for name in ("p50", "p99", "throughput_per_s")},
        "simulated": {
            name: middle(simulated, key)
            for name, key in (("p50", "p50_ms"), ("p99", "p99_ms"), ("throughput_per_s", "throughput_per_s"))
        },
    }
    off = {name: round(sides["simulated"][name] / sides["measured"][name] - 1, 4) for name in sides["measured"]}
    return {
        "load": load,
        "offered_per_s": round(offered, 2),
        **sides,
        "simulated_over_measured": off,
        "p99_of_the_runs_ms": [min(p99), max(p99)],
        "cores_used_by_others": max(run["cores_used_by_others"] for run in measured),
        "bars": {
            "p50": abs(off["p50"]) <= WITHIN,
            "throughput": abs(off["throughput_per_s"]) <= WITHIN,
            "p99": min(p99) <= sides["simulated"]["p99"] <= max(p99),
            "answered": all(run["not_answered"] == 0 for run in measured),
        },
        "runs": [{"measured": one, "simulated": other} for one, other in zip(measured, simulated)],
    }


def line(found: dict[str, Any]) -> str:
    """Return one load as a line of a table."""
    real, model, bars = found["measured"], found["simulated"], found["bars"]
    low, high = found["p99_of_the_runs_ms"]
    return (
        f"| {found['load']:.0%} ({found['offered_per_s']}/s) | {real['p50']} | {model['p50']} | {real['p99']} ({low}–{high}) | "
        f"{model['p99']} | {real['throughput_per_s']} | {model['throughput_per_s']} | "
        f"{found['cores_used_by_others']} | {'yes' if all(bars.values()) else 'NO: ' + ', '.join(name for name, met in bars.items() if not met)} |"
    )


def main() -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, help="of a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "capacity.json")
    parser.add_argument("--note", default="", help="what else ran on the machine, kept with the figures")
    options = parser.parse_args()
    machine = {**hardware("cpu"), "cores": os.cpu_count(), "server_threads": 1}
    print(
        "| load | p50 ms, measured | simulated | p99 ms, measured (of the runs) | simulated | answers/s | simulated | cores others used | agrees |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    found = measure(requests=options.requests, runs=options.runs)
    report = {
        "command": f"python eval/serving/capacity.py --requests {options.requests} --runs {options.runs}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine,
        "versions": versions(),
        "note": options.note,
        "figures": found,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print({name: value for name, value in found.items() if name != "loads"})
    return 0 if found["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
