"""Who is let in, and whose slot is next: told by a clock that the test turns itself."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from qwen_rerank.serve.admission import FairQueue
from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.settings import ServeSettings


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Line:
    """A queue, its clock, and the order in which slots were granted."""

    def __init__(self, **settings: object) -> None:
        self.clock = Clock()
        self.queue = FairQueue(ServeSettings(**{"max_running_tokens": 10, **settings}), clock=self.clock)
        self.granted: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.steps = asyncio.Semaphore(0)

    async def ask(self, tenant: str, label: str, *slices: int) -> asyncio.Task[None]:
        """Admit a request of these slices; each runs until `step`."""

        async def run_slice(admission, tokens: int) -> None:
            async with admission.slot(tokens):
                self.granted.append(label)
                await self.steps.acquire()

        async def run() -> None:
            with self.queue.admit(tenant, sum(slices)) as admission:
                await asyncio.gather(*(run_slice(admission, tokens) for tokens in slices))

        task = asyncio.create_task(run())
        self.tasks.append(task)
        await self.settle()
        return task

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def warm_up(self) -> None:
        """Let the queue see its speed: ten tokens a second."""
        for _ in range(20):
            await self.ask("warm-up", "warm-up", 10)
            await self.step()
        self.granted.clear()

    async def step(self, n: int = 1, *, seconds: float = 1.0) -> None:
        """Let `n` running slices end, one after the other."""
        for _ in range(n):
            self.clock.now += seconds
            self.steps.release()
            await self.settle()


async def test_a_small_request_behind_a_huge_one_waits_for_two_slices_at_most():
    line = Line()
    await line.ask("k", "huge", *[10] * 100)
    await line.ask("k", "small", 5)
    await line.step(3)

    assert "small" in line.granted[:3]


async def test_a_flood_of_small_requests_does_not_starve_a_huge_one():
    line = Line()
    await line.ask("k", "huge", *[10] * 5)
    for _ in range(100):
        await line.ask("k", "small", 10)
        await line.step()

    assert line.granted.count("huge") == 5


async def test_keys_share_equally_however_many_requests_one_sends():
    line = Line()
    for _ in range(50):
        await line.ask("flood", "flood", 10)
    for _ in range(10):
        await line.ask("quiet", "quiet", 10)
    await line.step(21)

    assert 9 <= line.granted[:21].count("quiet") <= 11


async def answered_of_the_quiet_key(*, flood: bool) -> int:
    """Return how many of 80 requests, at two fifths of the capacity, are answered by the time the last has come."""
    line = Line(patience_requests=2, max_queue_wait_s=5)
    await line.warm_up()
    for second in range(200):
        for _ in range(4 if flood else 0):
            await line.ask("flood", "flood", 10)
        if second % 5 in (0, 2):
            await line.ask("quiet", "quiet", 10)
        await line.step()
    return line.granted.count("quiet")


async def test_a_key_keeps_its_goodput_while_another_floods():
    """The flood is four times what the engine can do; the other key keeps nine tenths of what it gets alone."""
    alone = await answered_of_the_quiet_key(flood=False)
    beside = await answered_of_the_quiet_key(flood=True)

    assert alone == 80
    assert beside >= 0.9 * alone


async def test_a_key_that_rested_does_not_save_up_slots():
    line = Line()
    await line.ask("a", "a", *[10] * 30)
    await line.step(10)
    await line.ask("b", "b", *[10] * 30)
    await line.step(10)

    assert 4 <= line.granted[11:21].count("b") <= 6


async def test_no_more_than_the_limit_runs_but_one_that_is_larger_runs_alone():
    line = Line()
    await line.ask("k", "a", 6)
    await line.ask("k", "b", 4)
    await line.ask("k", "c", 50)
    assert line.granted == ["a", "b"]
    assert line.queue.running_tokens == 10

    await line.step(2)
    assert line.granted == ["a", "b", "c"]
    assert line.queue.running_tokens == 50


async def test_who_leaves_the_queue_is_never_started_and_leaves_no_trace():
    line = Line()
    await line.ask("k", "running", 10)
    gone = await line.ask("k", "gone", 10)
    await line.ask("k", "next", 10)
    gone.cancel()
    await line.settle()
    await line.step(2)

    assert line.granted == ["running", "next"]
    assert (line.queue.queued_tokens, line.queue.running_tokens, line.queue.running_slots, line.queue.requests) == (
        0,
    ) * 4


async def test_who_leaves_while_running_frees_the_place():
    line = Line()
    running = await line.ask("k", "running", 10)
    await line.ask("k", "next", 10)
    running.cancel()
    await line.settle()

    assert line.granted == ["running", "next"]


async def test_a_request_that_would_wait_too_long_is_refused_with_a_time():
    line = Line(patience_requests=1, max_queue_wait_s=5)
    await line.warm_up()
    await line.ask("k", "a", *[10] * 8)

    with pytest.raises(ApiError) as refused, line.queue.admit("k", 10):
        pass

    assert refused.value.status == 429
    assert refused.value.headers["retry-after"] == "3"  # 80 tokens wait or run, 8 s, and 5 s are allowed


async def test_a_flood_at_the_very_start_does_not_all_get_in():
    """Ten requests a second for an engine that does one: the waits are bounded before the speed is well known."""
    line = Line(patience_requests=1, max_queue_wait_s=5)
    for _ in range(30):
        for _ in range(10):
            await line.ask("k", "a", 10)
        await line.step()

    assert line.queue.requests <= 25
    refused = [task for task in line.tasks if task.done() and isinstance(task.exception(), ApiError)]
    assert len(refused) >= 240


async def test_another_key_is_let_in_while_one_floods():
    line = Line(patience_requests=1, max_queue_wait_s=5)
    await line.warm_up()
    await line.ask("flood", "a", *[10] * 50)

    with line.queue.admit("quiet", 10):
        pass
    with pytest.raises(ApiError), line.queue.admit("flood", 10):
        pass


async def test_a_few_requests_are_let_in_however_slow_the_model_is():
    line = Line(patience_requests=3, max_queue_wait_s=0.1)
    await line.warm_up()
    with contextlib.ExitStack() as inside:
        for _ in range(3):
            inside.enter_context(line.queue.admit("k", 10))

        assert line.queue.expected_wait_s("k") == pytest.approx(3)
        with pytest.raises(ApiError):
            inside.enter_context(line.queue.admit("k", 10))


@pytest.mark.parametrize(
    "settings", [{"max_queued_requests": 10}, {"max_queued_tokens": 100}], ids=["requests", "tokens"]
)
async def test_the_queue_is_bounded_and_its_bound_is_shared(settings):
    line = Line(patience_requests=1, **settings)
    with contextlib.ExitStack() as inside:
        for _ in range(10):
            inside.enter_context(line.queue.admit("flood", 10))
        for _ in range(5):
            inside.enter_context(line.queue.admit("quiet", 10))

        for tenant in ("flood", "quiet"):
            with pytest.raises(ApiError) as refused:
                inside.enter_context(line.queue.admit(tenant, 10))
            assert refused.value.status == 429


async def test_the_speed_counts_only_busy_time():
    line = Line()
    await line.warm_up()
    line.clock.now += 1_000
    await line.ask("k", "b", 10)
    await line.step(seconds=1)
    with line.queue.admit("k", 100):
        assert line.queue.expected_wait_s("k") == pytest.approx(10)


async def test_a_stall_is_seen_only_while_something_runs():
    line = Line()
    line.clock.now = 100
    assert line.queue.stalled_s == 0
    await line.ask("k", "a", 10)
    line.clock.now += 7
    assert line.queue.stalled_s == 7
    await line.step()
    assert line.queue.stalled_s == 0


async def test_giving_up_ends_every_deadline():
    line = Line()

    async def wait() -> None:
        async with line.queue.deadline(1_000):
            await asyncio.Event().wait()

    waiting = [asyncio.create_task(wait()) for _ in range(3)]
    await line.settle()
    line.queue.abandon()

    assert [type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [TimeoutError] * 3


async def test_random_traffic_never_loses_count(full):
    """Whatever comes and goes, at the end nothing is queued or running, and every admitted slice ran or was cancelled."""
    import random

    chance = random.Random(7)
    line = Line(max_running_tokens=30)
    for _ in range(2_000 if full else 300):
        action = chance.random()
        if action < 0.5:
            await line.ask(chance.choice("abc"), "x", *[chance.randint(1, 40) for _ in range(chance.randint(1, 4))])
        elif action < 0.8:
            await line.step(seconds=chance.random())
        elif line.tasks:
            chance.choice(line.tasks).cancel()
            await line.settle()
        assert line.queue.running_slots >= 0
        assert line.queue.running_tokens <= 30 or line.queue.running_slots == 1
    for task in line.tasks:
        task.cancel()
    await asyncio.gather(*line.tasks, return_exceptions=True)

    assert (line.queue.queued_tokens, line.queue.running_tokens, line.queue.running_slots, line.queue.requests) == (
        0,
    ) * 4
