"""Admission and slots: who is let in by the expected wait, and whose work is next by fair shares.

Start-time fair queueing on two levels: keys share the model equally, and so do the requests of one key. A long request
is scored in slices, each in a slot of its own, so a short one that comes later passes it. Nothing is done for those who
have left.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.settings import ServeSettings

_MEMORY_S = 10.0  # how long the measured speed remembers
_FEWEST_SLOTS = 16  # before which the measured speed is mostly noise


@dataclass(eq=False)
class _Slot:
    """A slice that waits for its slot."""

    admission: Admission
    tokens: int
    granted: asyncio.Future[None]


@dataclass(eq=False)
class _Tenant:
    """One key's share: its waiting slots, earliest virtual start first."""

    name: str
    clock: float
    requests: int = 0
    tokens: int = 0  # admitted and not yet handed to the scorer
    waiting: list[tuple[float, int, _Slot]] = field(default_factory=list)
    served: float = 0.0


@dataclass(eq=False)
class Admission:
    """An admitted request. `async with admission.slot(tokens):` waits for a slot and counts as running inside."""

    queue: FairQueue
    tenant: _Tenant
    tokens: int  # admitted and not yet handed to the scorer
    clock: float

    @asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[None]:
        """Wait until `tokens` of this request may run."""
        await self.queue._wait(self, tokens)
        try:
            yield
        finally:
            self.queue._done(tokens)


class FairQueue:
    """Admits requests and hands out slots.

    Args:
        settings: Its `max_queued_*`, `max_queue_wait_s`, `patience_requests` and `max_running_tokens` count here.
        clock: Seconds, monotonic.

    Attributes:
        max_running_tokens: Tokens handed to the scorer at a time.
        running_tokens: Those that are with the scorer now.
        running_slots: Scorer calls under way.
        requests: Requests admitted and not yet answered.
    """

    def __init__(self, settings: ServeSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._now = clock
        self._tenants: dict[str, _Tenant] = {}
        self._deadlines: set[asyncio.Timeout] = set()
        self._order = itertools.count()
        self._virtual = 0.0
        self._speed = _Speed()
        self._progress_at = clock()
        self.max_running_tokens = settings.max_running_tokens or 65_536
        self.running_tokens = 0
        self.running_slots = 0
        self.requests = 0

    @property
    def queued_tokens(self) -> int:
        """Tokens admitted and not yet handed to the scorer."""
        return sum(tenant.tokens for tenant in self._tenants.values())

    @property
    def stalled_s(self) -> float:
        """Seconds since something last moved, 0 while nothing runs."""
        return self._now() - self._progress_at if self.running_slots else 0.0

    @contextmanager
    def admit(self, name: str, tokens: int) -> Iterator[Admission]:
        """Take a request of `tokens` in, as long as the block lasts.

        Raises:
            ApiError: 429 with `Retry-After` where it would wait too long; nothing has been done for it then.
        """
        self._check_room(name, tokens)
        tenant = self._tenants.setdefault(name, _Tenant(name, clock=0.0, served=self._virtual))
        tenant.requests += 1
        tenant.tokens += tokens
        self.requests += 1
        admission = Admission(self, tenant, tokens, clock=tenant.clock)
        try:
            yield admission
        finally:
            tenant.requests -= 1
            tenant.tokens -= admission.tokens
            self.requests -= 1
            if not tenant.requests:
                del self._tenants[name]

    @asynccontextmanager
    async def deadline(self, seconds: float) -> AsyncIterator[None]:
        """Raise `TimeoutError` in the block after `seconds`, or when everything is given up."""
        async with asyncio.timeout(seconds) as timeout:
            self._deadlines.add(timeout)
            try:
                yield
            finally:
                self._deadlines.discard(timeout)

    def abandon(self) -> None:
        """Let every deadline pass now: the model will not come back."""
        for timeout in self._deadlines:
            timeout.reschedule(asyncio.get_running_loop().time())

    def expected_wait_s(self, name: str) -> float:
        """Return how long a request of this key would wait for its slot; 0 while the speed is unknown."""
        tenant = self._tenants.get(name)
        others = [other for other in self._tenants.values() if other.name != name and other.tokens]
        own = tenant.tokens if tenant else 0
        # With equal shares, a key waits for itself and for as much of every other one.
        ahead = self.running_tokens + own + sum(min(own, other.tokens) for other in others)
        return ahead / self._speed.tokens_per_s if self._speed.tokens_per_s else 0.0

    def _check_room(self, name: str, tokens: int) -> None:
        """Refuse what would wait too long: too many requests in all or of one key, its tokens, the wait to expect."""
        settings = self._settings
        tenant = self._tenants.get(name)
        if self.requests >= 2 * settings.max_queued_requests:
            raise _overloaded("too many requests are waiting", self.expected_wait_s(name))
        if tenant is None or tenant.requests < settings.patience_requests:
            return
        # What one key may hold shrinks as others come, so a flood from one leaves room for the next.
        if tenant.requests >= settings.max_queued_requests // len(self._tenants):
            raise _overloaded("too many requests are waiting", self.expected_wait_s(name))
        if tenant.tokens + tokens > settings.max_queued_tokens // len(self._tenants):
            raise _overloaded("too many tokens are waiting", self.expected_wait_s(name))
        if (wait := self.expected_wait_s(name)) > settings.max_queue_wait_s:
            raise _overloaded("the queue is too long", wait - settings.max_queue_wait_s)

    async def _wait(self, admission: Admission, tokens: int) -> None:
        """Wait for a slot, in the order of each key's fair share."""
        tenant = admission.tenant
        slot = _Slot(admission, tokens, asyncio.get_running_loop().create_future())
        start = max(tenant.clock, admission.clock)
        admission.clock = start + tokens
        heapq.heappush(tenant.waiting, (start, next(self._order), slot))
        self._dispatch()
        try:
            await slot.granted
        except asyncio.CancelledError:
            if slot.granted.done() and not slot.granted.cancelled():
                self._done(tokens)  # granted and cancelled in the same step of the loop
            slot.granted.cancel()
            raise

    def _done(self, tokens: int) -> None:
        self._progress(tokens)
        self.running_tokens -= tokens
        self.running_slots -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        """Give slots to those whose turn it is, as far as the running tokens allow."""
        while (tenant := self._next_tenant()) is not None:
            start, _, slot = tenant.waiting[0]
            if self.running_slots and self.running_tokens + slot.tokens > self.max_running_tokens:
                return
            heapq.heappop(tenant.waiting)
            # The clock runs with the work, shared by the key's requests; so an endless row of new requests, which
            # start at the clock, cannot keep an older one waiting for ever.
            tenant.clock = max(tenant.clock, start) + slot.tokens / max(1, tenant.requests)
            self._virtual = max(self._virtual, tenant.served)
            tenant.served += slot.tokens
            self._start(slot)

    def _next_tenant(self) -> _Tenant | None:
        """Return the key that has had least, among those that wait."""
        for tenant in self._tenants.values():
            while tenant.waiting and tenant.waiting[0][2].granted.done():  # left before its slot came
                heapq.heappop(tenant.waiting)
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        return min(waiting, key=lambda tenant: tenant.served, default=None)

    def _start(self, slot: _Slot) -> None:
        if not self.running_slots:
            self._speed.rest(self._now())
            self._progress_at = self._now()
        handed = min(slot.tokens, slot.admission.tokens)
        slot.admission.tokens -= handed
        slot.admission.tenant.tokens -= handed
        self.running_tokens += slot.tokens
        self.running_slots += 1
        slot.granted.set_result(None)

    def _progress(self, tokens: int) -> None:
        self._progress_at = self._now()
        self._speed.count(tokens, self._progress_at)


class _Speed:
    """Tokens a second while busy, as a decaying average."""

    def __init__(self) -> None:
        self._at = 0.0
        self._tokens = 0.0
        self._busy_s = 0.0
        self._slots = 0

    @property
    def tokens_per_s(self) -> float:
        """The speed, 0.0 as long as nothing was measured."""
        if self._busy_s <= 0:
            return 0.0
        # The fewer slots it rests on, the faster it is taken to be: noise refuses nobody, and yet a flood that comes at
        # the very start does not all get in.
        return self._tokens / self._busy_s * max(1.0, _FEWEST_SLOTS / self._slots)

    def rest(self, now: float) -> None:
        """Note that nothing ran until now."""
        self._at = now

    def count(self, tokens: int, now: float) -> None:
        """Note that `tokens` were finished since the last note."""
        elapsed = max(0.0, now - self._at)
        keep = math.exp(-elapsed / _MEMORY_S)
        self._tokens = self._tokens * keep + tokens
        self._busy_s = self._busy_s * keep + elapsed
        self._at = now
        self._slots += 1


def _overloaded(reason: str, wait_s: float) -> ApiError:
    retry_after_s = min(60.0, max(1.0, wait_s))
    return ApiError(429, "overloaded", f"the server is busy: {reason}; try again later.", retry_after_s=retry_after_s)
