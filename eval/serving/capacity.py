"""Do `plan` and the simulation tell what a real server does? Times are measured alone, then loads are measured and told.

    python eval/serving/capacity.py [--requests 300] [--runs 5] [--out FILE] [--note TEXT]

The machine is one core: `qwen-rerank serve --model pocket --threads 1` may run on the first core only, its clients on the
other, so that neither takes the other's time. What the simulation gets is measured beside the runs that it is compared
with, before and after each: engine passes of 1, 2, 3 … requests without a server; a request that comes right after another
one, or after a rest; and what the server sustains while more comes than it can do. What it then takes for a request beyond
an equal share of a full pass is its reading and answering, which on one core holds up the passes of others. `plan` gets less: the documents a second that are
sustained, what a lone request takes beyond its share of that, and the tokens of a pass. Loads are shares of what is
sustained; measured and simulated requests come at the same random moments. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

import numpy as np
from typer.testing import CliRunner

from eval.serving.load import Connection, Pool, percentiles_ms, question
from eval.speed.measure import hardware, versions
from qwen_rerank import load_scorer
from qwen_rerank.capacity import ServerTimes, poisson_arrivals, simulate
from qwen_rerank.cli import app
from qwen_rerank.scorers.base import ScoreRequest
from tests.serve.process import running

LOADS = (0.3, 0.6, 0.8)
N_DOCUMENTS = 10
SERVER_CORE, CLIENT_CORE = 0, 1
TOO_MUCH = 1.1  # times what full passes alone could do: more than any server with this engine sustains
FLOOD_S = 3.0  # short enough that nothing is refused
RESTED = 30  # requests with a rest before each
WORDS = 40  # of a document, a half more or less
PASSES = 6  # up to so many requests in one
WITHIN = 0.2  # of the measured median and throughput


def pin(pid: int, core: int) -> None:
    """Let all threads of a process run on one core only."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(task.name), {core})


def asked(label: str, chance: random.Random) -> tuple[str, list[str]]:
    """Return query and documents of a question."""
    body = json.loads(question(label, chance, n_documents=N_DOCUMENTS, words=WORDS).data.partition(b"\r\n\r\n")[2])
    return body["query"], body["documents"]


def engine_times(repeats: int) -> tuple[list[list[float]], float, int]:
    """Return seconds of passes with 1, 2, 3 … requests, nothing else running; the tokens of a request and of a pass."""
    chance = random.Random(1)
    with load_scorer("pocket", device="cpu", threads=1) as scorer:
        pin(os.getpid(), SERVER_CORE)
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
        budget = scorer.token_budget
    pin(os.getpid(), CLIENT_CORE)
    return seconds, statistics.mean(tokens), budget


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
        "throughput_while_they_come": round(
            sum(arrivals[-1] / 4 < end <= arrivals[-1] for end in ends) / (0.75 * arrivals[-1]), 3
        ),
        "not_answered": sum(status != 200 for status in statuses),
        "client_late_ms": percentiles_ms(late),
    }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured while nothing waits, and of what is sustained; seconds, requests and tokens."""

    passes: list[list[float]]
    tokens: float
    budget: int
    alone_s: float
    rested_s: float
    sustained_per_s: float
    worked_s: float

    @property
    def most(self) -> int:
        """Requests that fit one pass."""
        return max(1, int(self.budget // self.tokens))

    def times(self) -> ServerTimes:
        """Return what the simulation gets."""
        pass_s = [statistics.mean(each) for each in self.passes]
        spread = [second / mean for each, mean in zip(self.passes, pass_s) for second in each]
        beyond = max(0.0, self.alone_s - pass_s[0])
        times = ServerTimes(
            pass_s=pass_s, front_s=beyond / 2, back_s=beyond / 2, wake_s=max(0.0, self.rested_s - self.alone_s),
            most_in_a_pass=self.most, spread=spread,
        )  # fmt: skip
        return replace(times, held_s=max(0.0, 1 / self.sustained_per_s - float(times.pass_times()[-1]) / self.most))

    def speed(self) -> dict[str, Any]:
        """Return what `plan` gets."""
        return {
            "name": "this", "what": "pocket on one core", "documents_per_s": self.sustained_per_s * N_DOCUMENTS,
            "tokens": round(self.tokens / N_DOCUMENTS), "source": "eval/serving/capacity.py",
            "request_s": max(0.0, self.rested_s - 1 / self.sustained_per_s), "token_budget": self.budget,
        }  # fmt: skip

    def told(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        times = self.times()
        return {
            "pass_ms": [round(1e3 * each, 3) for each in times.pass_s],
            "alone_ms": round(1e3 * self.alone_s, 3),
            "after_a_rest_ms": round(1e3 * self.rested_s, 3),
            "cpu_of_a_request_ms": round(1e3 * self.worked_s, 3),
            "sustained_per_s": round(self.sustained_per_s, 2),
            "tokens_of_a_request": round(self.tokens, 1),
            "token_budget": self.budget,
            "held_ms": round(1e3 * times.held_s, 3),
        }


def calibrate(port: int, pid: int, label: str) -> Measured:
    """Measure all that is measured alone."""
    passes, tokens, budget = engine_times(repeats=5)
    asyncio.run(one_by_one(port, 10))
    alone = statistics.mean(asyncio.run(one_by_one(port, 35)))
    before = cpu_s(pid)
    rested = asyncio.run(offer(port, [4 * i * alone for i in range(RESTED)], f"{label}-rested"))["p50"] / 1e3
    worked = (cpu_s(pid) - before) / RESTED
    most = max(1, int(budget // tokens))
    full = float(ServerTimes(pass_s=[statistics.mean(each) for each in passes], most_in_a_pass=most).pass_times()[-1])
    sustained = []
    for turn in range(2):
        rate = TOO_MUCH * most / full
        flood = poisson_arrivals(rate, int(FLOOD_S * rate), seed=turn).tolist()
        found = asyncio.run(offer(port, flood, f"{label}-flood-{turn}"))
        assert not found["not_answered"]
        sustained.append(found["throughput_while_they_come"])
    return Measured(
        passes=passes, tokens=tokens, budget=budget, alone_s=alone, rested_s=rested,
        sustained_per_s=statistics.mean(sustained), worked_s=worked,
    )  # fmt: skip


def both(one: Measured, other: Measured) -> Measured:
    """Return the mean of two, with the passes of both."""
    means = {
        name: (getattr(one, name) + getattr(other, name)) / 2
        for name in ("tokens", "alone_s", "rested_s", "sustained_per_s", "worked_s")
    }
    return replace(one, passes=[a + b for a, b in zip(one.passes, other.passes)], **means)


def planned(speed: dict[str, Any], rate: float, arrivals: Sequence[float]) -> dict[str, float]:
    """Return what `qwen-rerank plan` says of requests at these moments on this machine."""
    with tempfile.TemporaryDirectory() as name:
        measured, trace = Path(name, "measured.json"), Path(name, "trace")
        measured.write_text(json.dumps([speed]))
        trace.write_text("\n".join(map(str, arrivals)))
        done = CliRunner().invoke(app, [
            "plan", "--qps", str(rate), "--docs", str(N_DOCUMENTS), "--tokens", str(speed["tokens"]), "--busy", "1",
            "--measured", str(measured), "--trace", str(trace), "--json",
        ], catch_exceptions=False)  # fmt: skip
    found = json.loads(done.output)
    assert found["machines"] == 1
    return found["simulated"]


def measure(*, requests: int, runs: int) -> dict[str, Any]:
    """Return what was measured, simulated and planned at each load."""
    measured: dict[float, list[dict[str, Any]]] = {load: [] for load in LOADS}
    arrivals: dict[float, list[np.ndarray]] = {load: [] for load in LOADS}
    with running(["-m", "qwen_rerank", "serve", "--model", "pocket", "--threads", "1", "--port", "0"]) as server:
        pid = server.process.pid
        pin(pid, SERVER_CORE)
        known = [calibrate(server.port, pid, "before")]
        gc.freeze()
        for run in range(runs):
            for load in LOADS:
                rate = load * known[-1].sustained_per_s
                moments = poisson_arrivals(rate, requests, seed=1000 * run + int(100 * load))
                others, start = others_cpu_s(pid), time.perf_counter()
                measured[load].append(asyncio.run(offer(server.port, moments.tolist(), f"load-{load}-{run}")))
                others = (others_cpu_s(pid) - others) / (time.perf_counter() - start)
                measured[load][-1] |= {"offered_per_s": round(rate, 2), "cores_used_by_others": round(others, 3)}
                arrivals[load].append(moments)
            known.append(calibrate(server.port, pid, f"after-{run}"))
    # A machine's speed drifts, and near its limit a few percent decide how long the queue is.
    beside = [both(before, after) for before, after in itertools.pairwise(known)]
    loads = []
    for load in LOADS:
        simulated = [
            simulate(each, now.times(), seed=run).as_dict()
            for run, (each, now) in enumerate(zip(arrivals[load], beside))
        ]
        plans = [
            planned(now.speed(), load * now.sustained_per_s, each.tolist()) for each, now in zip(arrivals[load], beside)
        ]
        loads.append(compared(load, measured[load], simulated, plans))
        print(line(loads[-1]), flush=True)
    return {
        "measured_alone": [each.told() for each in known],
        "most_in_a_pass": known[0].most,
        "requests": requests,
        "loads": loads,
        "met": all(all(load["bars"].values()) for load in loads),
    }


def compared(
    load: float, measured: list[dict[str, Any]], simulated: list[dict[str, Any]],
    plans: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Return all sides of one load and which bars are met."""
    named = {"p50": "p50_ms", "p99": "p99_ms", "throughput_per_s": "throughput_per_s"}
    sides = {
        side: {name: round(statistics.median(run[named[name] if told else name] for run in found), 3) for name in named}
        for side, found, told in (("measured", measured, False), ("simulated", simulated, True), ("plan", plans, True))
    }
    off = {
        side: {name: round(sides[side][name] / sides["measured"][name] - 1, 4) for name in named}
        for side in ("simulated", "plan")
    }
    p99 = [run["p99"] for run in measured]
    bars = {"answered": all(run["not_answered"] == 0 for run in measured)}
    for side in off:
        bars |= {
            f"{side}: p50": abs(off[side]["p50"]) <= WITHIN,
            f"{side}: throughput": abs(off[side]["throughput_per_s"]) <= WITHIN,
            f"{side}: p99": min(p99) <= sides[side]["p99"] <= max(p99),
        }
    return {
        "load": load,
        "offered_per_s": statistics.median(run["offered_per_s"] for run in measured),
        **sides,
        "over_measured": off,
        "p99_of_the_runs_ms": [min(p99), max(p99)],
        "cores_used_by_others": max(run["cores_used_by_others"] for run in measured),
        "bars": bars,
        "runs": [
            {"measured": one, "simulated": other, "plan": third}
            for one, other, third in zip(measured, simulated, plans)
        ],
    }


HEADER = (
    "| load | p50 ms: measured | simulated | plan | p99 ms: measured (of the runs) | simulated | plan "
    "| answers/s: measured | simulated | plan | cores others used | agrees |"
)


def line(found: dict[str, Any]) -> str:
    """Return one load as a line of a table."""
    sides = [found[side] for side in ("measured", "simulated", "plan")]
    missed = [name for name, met in found["bars"].items() if not met]
    low, high = found["p99_of_the_runs_ms"]
    p99 = [f"{sides[0]['p99']} ({low}–{high})", *(side["p99"] for side in sides[1:])]
    cells = [f"{found['load']:.0%} ({found['offered_per_s']}/s)", *(side["p50"] for side in sides), *p99]
    cells += [*(side["throughput_per_s"] for side in sides), found["cores_used_by_others"]]
    return f"| {' | '.join(map(str, cells))} | {'NO: ' + ', '.join(missed) if missed else 'yes'} |"


def main() -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, help="of a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "capacity.json")
    parser.add_argument("--note", default="", help="what else ran on the machine, kept with the figures")
    options = parser.parse_args()
    machine = {
        **hardware("cpu"),
        "cores": os.cpu_count(),
        "server_threads": 1,
        "server_core": SERVER_CORE,
        "client_core": CLIENT_CORE,
    }
    print(HEADER)
    print("|" + " --- |" * (HEADER.count("|") - 1))
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
