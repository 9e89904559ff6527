"""A simulation of rerank servers under load: requests come, wait, are computed in batches, and go elsewhere when one fails."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError

_TRIES = 4  # of one request at different servers, as `HttpScorer` has
_WARM_UP = 0.1  # of the requests, in which the queues fill; they are not counted


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTimes:
    """The times of one server, measured while nothing waits.

    A request is first read by the event loop (`front_s`), waits for the engine, is computed in a pass with whatever else
    waits then, and is answered by the event loop (`back_s`). The event loop does one thing at a time, and so does the
    engine. Both are threads of one interpreter, so the loop's work also holds up a pass that is going on (`held_s`).

    Attributes:
        pass_s: Seconds of an engine pass with 1, 2, 3 … requests, ascending; beyond the last one it grows by their slope,
            taken by least squares.
        front_s: Seconds of the event loop before a request waits for the engine.
        back_s: Seconds of the event loop for an answer.
        wake_s: Further seconds of a request that finds the server idle: cores sleep, caches are cold.
        held_s: Seconds by which one request's reading and answering hold up the passes of others.
        most_in_a_pass: Requests that fit one pass.
        spread: Passes measured over their mean; one of them is drawn for each pass. (1.0,) for passes that never vary.
        max_wait_s: Expected wait at which the server refuses a request (429).
        patience: Requests under way up to which it never refuses.
    """

    pass_s: Sequence[float]
    front_s: float = 0.0
    back_s: float = 0.0
    wake_s: float = 0.0
    held_s: float = 0.0
    most_in_a_pass: int = 64
    spread: Sequence[float] = (1.0,)
    max_wait_s: float = 2.0
    patience: int = 8

    def __post_init__(self) -> None:
        check_count("most_in_a_pass", self.most_in_a_pass)
        check_count("patience", self.patience)
        for name in ("pass_s", "spread"):
            values = getattr(self, name)
            if not len(values) or not all(0 < value < float("inf") for value in values):
                raise InvalidInputError(f"{name} must hold at least one number above 0, not {values!r}.")
        if any(later < earlier for earlier, later in itertools.pairwise(self.pass_s)):
            raise InvalidInputError(
                f"pass_s must be ascending, not {self.pass_s!r}: a pass with more requests takes no less time; measure longer."
            )
        for name in ("front_s", "back_s", "wake_s", "held_s", "max_wait_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidInputError(f"{name} must be a number of seconds, not {getattr(self, name)!r}.")

    @property
    def requests_per_s(self) -> float:
        """Requests a second that one server can do at most, in full passes."""
        full = self.pass_times()[-1] / self.most_in_a_pass + self.held_s
        return float(1.0 / max(full, self.front_s + self.back_s))

    def pass_times(self) -> np.ndarray:
        """Return seconds of a pass with 1 … `most_in_a_pass` requests, float64 `(most_in_a_pass,)`."""
        known = np.asarray(self.pass_s, dtype=np.float64)
        # The slope of all of them: between the last two alone, noise would decide what a full pass takes.
        step = np.polyfit(np.arange(len(known)), known, 1)[0] if len(known) > 1 else known[-1]
        more = known[-1] + max(0.0, step) * np.arange(1, self.most_in_a_pass - len(known) + 1)
        return np.concatenate([known, more])[: self.most_in_a_pass]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Servers that die and come back.

    Attributes:
        at: `(server, from second, to second)`: when which one is away. Those of one server may overlap.
        notice_s: Seconds until a client sees that its request is gone and asks another server.
    """

    at: Sequence[tuple[int, float, float]] = ()
    notice_s: float = 0.1

    @classmethod
    def random(cls, n_servers: int, seconds: float, *, every_s: float, away_s: float, seed: int) -> Failures:
        """Return failures of each server at random moments, `every_s` apart on average, `away_s` long."""
        chance = random.Random(seed)
        found = []
        for server in range(n_servers):
            at = chance.expovariate(1 / every_s)
            while at < seconds:
                found.append((server, at, at + away_s))
                at += away_s + chance.expovariate(1 / every_s)
        return cls(at=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedTraffic:
    """The traffic of a simulation, without its warm-up.

    Attributes:
        latencies_s: float64 `(n_answered,)`, from arrival to answer.
        requests: How many came.
        refused: Those that a server refused because they would wait too long (429).
        lost: Those that no server answered.
        repeated: Tries beyond the first, after a server failed.
        throughput_per_s: Answers a second.
        busy: Share of the servers' time in which their engines computed.
        mean_pass: Requests of a pass on average.
    """

    latencies_s: np.ndarray
    requests: int
    refused: int
    lost: int
    repeated: int
    throughput_per_s: float
    busy: float
    mean_pass: float

    def percentile_s(self, percent: float) -> float:
        """Return a percentile of the latencies in seconds; infinity where nothing was answered."""
        n = len(self.latencies_s)
        return float(np.percentile(self.latencies_s, percent, method="inverted_cdf")) if n else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them, times in milliseconds."""
        return {
            **{f"p{p}_ms": round(1e3 * self.percentile_s(p), 2) for p in (50, 95, 99)},
            "throughput_per_s": round(self.throughput_per_s, 3),
            "busy": round(self.busy, 4),
            "mean_pass": round(self.mean_pass, 3),
            **{name: getattr(self, name) for name in ("requests", "refused", "lost", "repeated")},
        }


def poisson_arrivals(requests_per_s: float, count: int, *, seed: int) -> np.ndarray:
    """Return the seconds at which `count` requests come at random, float64 `(count,)`, ascending."""
    if not 0 < requests_per_s < float("inf"):
        raise InvalidInputError(f"requests_per_s must be a number above 0, not {requests_per_s!r}.")
    gaps = np.random.default_rng(seed).exponential(1 / requests_per_s, check_count("count", count))
    return np.asarray(np.cumsum(gaps))


def simulate(
    arrivals: np.ndarray, times: ServerTimes, *, n_servers: int = 1, failures: Failures | None = None, seed: int = 0
) -> SimulatedTraffic:
    """Return what becomes of requests that ask the least busy of equal servers.

    The same arguments give the same result. It is a model: no network, no garbage collection, no other process.

    Args:
        arrivals: Seconds at which requests come, ascending, `(n_requests,)`: `poisson_arrivals`, or a trace.
        times: Of each server.
        n_servers: How many there are.
        failures: When which one is away; None for never.
        seed: Of the passes' spread.
    """
    check_count("n_servers", n_servers)
    moments = np.asarray(arrivals, dtype=np.float64)
    if moments.ndim != 1 or not len(moments) or (np.diff(moments) < 0).any() or not np.isfinite(moments).all():
        raise InvalidInputError("arrivals must be seconds, ascending, at least one.")
    for server, since, until in failures.at if failures is not None else ():
        if not 0 <= server < n_servers:
            raise InvalidInputError(f"failures names server {server}, but there are only {n_servers}, from 0.")
        if not since <= until:
            raise InvalidInputError(f"failures must end after they begin, not last from second {since} to {until}.")
    return _Simulation(moments, times, n_servers, failures or Failures(), seed).run()


@dataclass(slots=True, eq=False)
class _SimulatedServer:
    """One server at a moment."""

    number: int
    loop_free: float = 0.0  # when the event loop has done what it was given
    computing: bool = False
    held_s: float = 0.0  # by which the pass that is going on ends later
    waiting: deque[int] = field(default_factory=deque)
    under_way: set[int] = field(default_factory=set)
    life: int = 0  # changes when it dies, so that what it had planned does not happen
    up: bool = True


_READY, _PASS_ENDS, _ANSWERED, _DIES, _RETURNS, _AGAIN = range(6)


class _Simulation:
    """The events of one run, in order of time."""

    def __init__(self, arrivals: np.ndarray, times: ServerTimes, n_servers: int, failures: Failures, seed: int) -> None:
        self._arrivals = arrivals
        self._times = times
        self._pass_s = times.pass_times().tolist()
        self._each_s = 1.0 / times.requests_per_s
        self._spread = itertools.cycle(
            np.random.default_rng(seed).choice(np.asarray(times.spread, dtype=np.float64), 9973).tolist()
        )
        self._servers = [_SimulatedServer(number) for number in range(n_servers)]
        self._notice_s = failures.notice_s
        self._order = itertools.count()
        self._events: list[tuple[float, int, int, Any]] = []
        # The least busy first. An entry that is not true any more is passed over; turns share out equally busy ones.
        self._idle = [(0, number, number) for number in range(n_servers)]
        self._answered_at = np.full(len(arrivals), np.nan)
        self._tries = bytearray(len(arrivals))
        self._refused = bytearray(len(arrivals))
        self._busy_s = 0.0
        self._passes = 0
        self._computed = 0
        for server, since, until in _merged(failures.at):
            self._at(since, _DIES, server)
            self._at(until, _RETURNS, server)

    def run(self) -> SimulatedTraffic:
        """Let everything happen."""
        events = self._events
        for request, now in enumerate(self._arrivals.tolist()):
            while events and events[0][0] <= now:
                self._happen()
            self._send(request, now)
        while events:
            self._happen()
        return self._traffic()

    def _at(self, when: float, what: int, about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, about))

    def _happen(self) -> None:
        now, _, what, about = heapq.heappop(self._events)
        if what == _AGAIN:
            self._send(about, now)
        elif what == _DIES:
            self._die(self._servers[about], now)
        elif what == _RETURNS:
            server = self._servers[about]
            server.up, server.loop_free = True, now
            self._offer(server)
        else:
            server, life, request = about
            if server.life != life:
                return
            if what == _READY:
                server.waiting.append(request)
                self._compute(server, now)
            elif what == _PASS_ENDS and server.held_s:
                self._busy_s += server.held_s
                self._at(now + server.held_s, _PASS_ENDS, about)
                server.held_s = 0.0
            elif what == _PASS_ENDS:
                self._answer(server, request, now)
            else:
                server.under_way.discard(request)
                self._answered_at[request] = now
                self._offer(server)

    def _offer(self, server: _SimulatedServer) -> None:
        heapq.heappush(self._idle, (len(server.under_way), next(self._order), server.number))

    def _least_busy(self) -> _SimulatedServer | None:
        while self._idle:
            count, _, number = heapq.heappop(self._idle)
            server = self._servers[number]
            if server.up and len(server.under_way) == count:
                return server
        return None

    def _send(self, request: int, now: float) -> None:
        server = self._least_busy()
        if server is None:
            if self._tries[request] < _TRIES - 1:
                self._tries[request] += 1
                self._at(now + self._notice_s, _AGAIN, request)
            return
        ahead = len(server.under_way)
        if ahead >= self._times.patience and ahead * self._each_s > self._times.max_wait_s:
            self._refused[request] = 1
            self._offer(server)
            return
        server.under_way.add(request)
        self._offer(server)
        wake_s = 0.0 if ahead else self._times.wake_s
        server.loop_free = max(server.loop_free, now) + wake_s + self._times.front_s
        self._hold(server)
        self._at(server.loop_free, _READY, (server, server.life, request))

    def _hold(self, server: _SimulatedServer) -> None:
        """Let half of one request's work on the event loop hold up a pass that is going on."""
        if server.computing:
            server.held_s += self._times.held_s / 2

    def _compute(self, server: _SimulatedServer, now: float) -> None:
        if server.computing or not server.waiting:
            return
        batch = [server.waiting.popleft() for _ in range(min(len(server.waiting), self._times.most_in_a_pass))]
        seconds = self._pass_s[len(batch) - 1] * next(self._spread)
        server.computing, server.held_s = True, 0.0
        self._busy_s += seconds
        self._passes += 1
        self._computed += len(batch)
        self._at(now + seconds, _PASS_ENDS, (server, server.life, batch))

    def _answer(self, server: _SimulatedServer, batch: list[int], now: float) -> None:
        server.computing = False
        self._compute(server, now)
        for request in batch:
            server.loop_free = max(server.loop_free, now) + self._times.back_s
            self._hold(server)
            self._at(server.loop_free, _ANSWERED, (server, server.life, request))

    def _die(self, server: _SimulatedServer, now: float) -> None:
        gone = sorted(server.under_way)
        server.up, server.computing, server.held_s, server.life = False, False, 0.0, server.life + 1
        server.waiting.clear()
        server.under_way.clear()
        for request in gone:
            if self._tries[request] < _TRIES - 1:
                self._tries[request] += 1
                self._at(now + self._notice_s, _AGAIN, request)

    def _traffic(self) -> SimulatedTraffic:
        first = int(_WARM_UP * len(self._arrivals))
        came, answered_at = self._arrivals[first:], self._answered_at[first:]
        done = ~np.isnan(answered_at)
        refused = int(np.frombuffer(self._refused, np.uint8)[first:].sum())
        span = max(float(np.nanmax(answered_at) - came[0]), 1e-9) if done.any() else 1.0
        end = max(float(self._arrivals[-1]), float(np.nanmax(self._answered_at)) if done.any() else -np.inf)
        lasted = max(end - float(self._arrivals[0]), 1e-9)  # a trace may begin at any second, such as one of this year
        return SimulatedTraffic(
            latencies_s=answered_at[done] - came[done],
            requests=len(came),
            refused=refused,
            lost=len(came) - int(done.sum()) - refused,
            repeated=int(np.frombuffer(self._tries, np.uint8)[first:].sum()),
            throughput_per_s=float(int(done.sum()) / span),
            busy=self._busy_s / (lasted * len(self._servers)),
            mean_pass=self._computed / max(1, self._passes),
        )


def _merged(outages: Sequence[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Return outages of which no two of one server overlap."""
    found: list[tuple[int, float, float]] = []
    for server, since, until in sorted(outages):
        if found and found[-1][0] == server and since <= found[-1][2]:
            found[-1] = (server, found[-1][1], max(until, found[-1][2]))
        else:
            found.append((server, since, until))
    return found
