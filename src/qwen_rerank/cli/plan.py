"""`qwen-rerank plan`: machines and costs for a load, with the arithmetic."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    import numpy as np

    from qwen_rerank.capacity import Failures, Plan, ServerTimes, SimulatedTraffic

_SIMULATED = 10_000  # requests at least
_SIMULATED_EACH = 20  # requests of each machine at least, as no queue forms while most have none
_MOST_MACHINES = 20_000  # that are simulated
_MOST_TRACE_BYTES = 1 << 25


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(plan)


def plan(
    *,
    qps: Annotated[float, typer.Option("--qps", help="Queries a second.")],
    docs: Annotated[int, typer.Option("--docs", min=1, help="Documents of each query.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of each document.")],
    price: Annotated[float | None, typer.Option("--price", help="Of a machine for an hour, in any currency.")] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="Which measured speed: h100, h100-long, cpu, mini-cpu.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured", help="A JSON file with speeds of your own machines.", callback=options.expanded_or_none
        ),
    ] = None,
    documents_per_second: Annotated[
        float | None, typer.Option("--documents-per-second", help="Of one machine, at --tokens, measured by you.")
    ] = None,
    busy: Annotated[float, typer.Option("--busy", help="Share of its time that a machine may compute.")] = 0.7,
    spare: Annotated[
        int, typer.Option("--spare", help="Machines that may be away; what is simulated is simulated without them.")
    ] = 0,
    p99: Annotated[
        float | None,
        typer.Option("--p99", help="Simulate, and add machines until 99 % are answered within these seconds."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            help="Simulate requests that come at these seconds, one number a line, instead of at random.",
            callback=options.expanded_or_none,
        ),
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate how long requests wait.")] = False,
    failures: Annotated[
        int,
        typer.Option("--failures", min=0, help="Simulate so many failures, each of one machine at a random moment."),
    ] = 0,
    away: Annotated[float, typer.Option("--away", help="Seconds for which a failed machine is away.")] = 5.0,
    as_json: options.Json = False,
) -> None:
    """Say how many machines a load needs and what a million reranks cost, line by line."""
    from qwen_rerank.capacity import Speed, make_plan, read_speeds, server_times, shipped_speeds
    from qwen_rerank.capacity.planning import choose_speed
    from qwen_rerank.errors import InvalidInputError

    if not 0 < qps < float("inf"):
        raise InvalidInputError(f"--qps must be a number of queries a second above 0, not {qps!r}.")
    if not 0 <= away < float("inf"):
        raise InvalidInputError(f"--away must be a number of seconds, 0 or more, not {away!r}.")
    if documents_per_second is not None:
        if measured is not None or on is not None:
            raise InvalidInputError("give --documents-per-second, or --on and --measured; not both.")
        speed = Speed(
            name="yours", what="your machine", documents_per_s=documents_per_second, tokens=tokens,
            source="--documents-per-second",
        )  # fmt: skip
    else:
        speed = choose_speed(shipped_speeds() if measured is None else read_speeds(measured), on)
    found = make_plan(speed, requests_per_s=qps, documents=docs, tokens=tokens, price=price, busy=busy, spare=spare)
    if simulate or failures or p99 is not None or trace is not None:
        if found.machines > _MOST_MACHINES:
            raise InvalidInputError(
                f"{found.machines} machines are too many to simulate; the most are {_MOST_MACHINES}."
            )
        arrivals = _arrivals(trace, qps, found.machines)
        times = server_times(speed, documents=docs, tokens=tokens)
        found, traffic = _simulated(found, qps, spare, arrivals, times, p99, _Outages(failures, away))
        found.lines.append(("simulated", _told(traffic, found.machines - spare, spare)))
        if failures:
            told = f"each {away:g} s: {traffic.repeated:,} requests repeated elsewhere, {traffic.lost:,} lost"
            found.lines.append((f"with {failures:,} failures", told))
        found = replace(found, simulated=traffic.as_dict())
    if as_json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    width = max(len(name) for name, _ in found.lines)
    for name, text in found.lines:
        typer.echo(f"{name:<{width}}  {text}")


def _arrivals(trace: Path | None, qps: float, machines: int) -> np.ndarray:
    import numpy as np

    from qwen_rerank.capacity import poisson_arrivals
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.regular_files import read_regular

    if trace is None:
        count = max(_SIMULATED, int(min(qps, 20 * _SIMULATED)), _SIMULATED_EACH * machines)
        return poisson_arrivals(qps, count, seed=0)
    try:
        text = TextIOWrapper(BytesIO(read_regular(trace, most_bytes=_MOST_TRACE_BYTES)), encoding="utf-8")
        return np.sort(np.loadtxt(text, dtype=np.float64, ndmin=1))
    except (OSError, ValueError) as exc:
        raise InvalidInputError(f"{trace} cannot be read as one number of seconds a line ({exc}).") from exc


@dataclass(frozen=True, slots=True)
class _Outages:
    """The failures of machines in a simulation: how often, and for how long."""

    count: int
    away_s: float

    def of(self, machines: int, arrivals: np.ndarray) -> Failures:
        """Return them at random moments of so many machines; the same for the same arguments."""
        from qwen_rerank.capacity import Failures

        chance, first, last = random.Random(0), float(arrivals[0]), float(arrivals[-1])
        at = [(chance.randrange(machines), chance.uniform(first, last)) for _ in range(self.count)]
        return Failures(at=[(machine, moment, moment + self.away_s) for machine, moment in at])


def _simulated(
    found: Plan, qps: float, spare: int, arrivals: np.ndarray, times: ServerTimes, p99: float | None, outages: _Outages
) -> tuple[Plan, SimulatedTraffic]:
    """Return the plan with as many machines as keep the 99th percentile without the spare ones, and the traffic then."""
    from qwen_rerank.capacity import simulate
    from qwen_rerank.errors import InvalidInputError

    alone = times.pass_s[0]
    if p99 is not None and p99 <= alone:
        raise InvalidInputError(
            f"--p99 {p99:g} cannot be kept: a request takes {alone:.3g} s on a machine with nothing else to do; "
            "send fewer documents, or take a faster machine or a smaller model."
        )
    cost = found.cost_per_hour
    needed = machines = found.machines - spare  # what is kept must be kept while the spare ones are away
    while True:
        traffic = simulate(arrivals, times, n_servers=machines, failures=outages.of(machines, arrivals))
        if p99 is None or (traffic.percentile_s(99) <= p99 and not traffic.refused and not traffic.lost):
            break
        if machines >= 4 * needed + 10:
            raise InvalidInputError(
                f"--p99 {p99:g} is not kept by {machines} machines either; requests come in bursts, or too many fail."
            )
        machines += max(1, machines // 20)
    if machines == needed:
        return found, traffic
    every = machines + spare
    hourly = None if cost is None else cost / found.machines * every
    million = None if hourly is None else hourly / (qps * 3600) * 1e6
    without = found.documents_per_s / (machines * found.machine_documents_per_s)
    share = found.documents_per_s / (every * found.machine_documents_per_s)
    more = f"; and {spare:,} spare: {every:,}, {share:.0%} busy" if spare else ""
    lines = [*found.lines, (f"machines for {p99:g} s", f"{machines:,} by simulation, {without:.0%} busy{more}")]
    if hourly is not None and million is not None:
        lines.append(("cost with them", f"{hourly:,.2f} an hour, {million:,.2f} for a million reranks"))
    return replace(
        found, machines=every, busy=share, busy_without_spare=without, cost_per_hour=hourly,
        cost_per_million=million, lines=lines,
    ), traffic  # fmt: skip


def _told(traffic: SimulatedTraffic, machines: int, spare: int) -> str:
    half, most = 1e3 * traffic.percentile_s(50), 1e3 * traffic.percentile_s(99)
    refused = f", {traffic.refused:,} refused" if traffic.refused else ""
    away = ", the spare away" if spare else ""
    return (
        f"p50 {half:,.0f} ms, p99 {most:,.0f} ms over {traffic.requests:,} requests on {machines:,} machines{away}{refused}; "
        "a model of the queue alone, without network"
    )
