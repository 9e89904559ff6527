"""The scheduler's promises, on a stand-in for the model that scores a document by its first token."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from qwen_rerank.errors import DeviceOutOfMemoryError, NonFiniteScoreError, ScorerClosedError, ScorerError
from qwen_rerank.scorers.qwen.packing import PackedBatch, QueryGroup
from qwen_rerank.scorers.qwen.scheduler import Caller, DeviceLostError, Scheduler

NAN, POISON, CRASH, HUGE = 901, 902, 903, 904


class Model:
    """Scores a document by its first id; some ids misbehave. `gate` lets a test hold the device."""

    def __init__(self, *, memory: int = 10**9) -> None:
        self.batches: list[list[int]] = []
        self.memory = memory
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, batch: PackedBatch) -> np.ndarray:
        self.entered.release()
        self.gate.wait(30)
        firsts = [int(group_slice.group.documents[i][0]) for group_slice in batch.slices for i in group_slice.indices]
        self.batches.append(firsts)
        if CRASH in firsts:
            raise SystemExit("the worker died")
        if batch.tokens > self.memory or HUGE in firsts:
            raise DeviceOutOfMemoryError("no room")
        if POISON in firsts:
            raise RuntimeError("a kernel refused")
        return np.array([np.nan if first == NAN else first for first in firsts], dtype=np.float32)


def group(*firsts: int, length: int = 10) -> QueryGroup:
    return QueryGroup(np.zeros(2, np.int32), tuple(np.full(length, first, np.int32) for first in firsts))


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def scheduler(model):
    made = Scheduler(model, token_budget=100)
    yield made
    model.gate.set()
    made.close()


def hold(model: Model, scheduler: Scheduler, *firsts: int) -> Caller:
    """Let a caller's first batch enter the device and stay there."""
    model.gate.clear()
    caller = Caller()
    scheduler.submit(caller, group(*firsts))
    assert model.entered.acquire(timeout=30)
    return caller


def test_scores_come_back_in_the_callers_order(scheduler):
    future = scheduler.submit(
        Caller(), QueryGroup(np.zeros(1, np.int32), tuple(np.full(n, n, np.int32) for n in (3, 90, 1, 40)))
    )

    assert future.result(30).scores.tolist() == [3, 90, 1, 40]


def test_a_poison_document_fails_alone(scheduler):
    """A batch that fails is halved until the document at fault stands alone; its neighbours are scored."""
    futures = [scheduler.submit(Caller(), group(*firsts)) for firsts in ([1, 2], [3, POISON, 4], [5])]
    results = [future.result(30) for future in futures]

    assert [result.scores[np.isfinite(result.scores)].tolist() for result in results] == [[1, 2], [3, 4], [5]]
    assert [list(result.failed) for result in results] == [[], [1], []]
    assert isinstance(results[1].failed[1].__cause__, RuntimeError)


def test_a_score_that_is_no_number_is_an_error(scheduler):
    result = scheduler.submit(Caller(), group(1, NAN)).result(30)

    assert isinstance(result.failed[1], NonFiniteScoreError)
    assert result.scores[0] == 1
    assert np.isnan(result.scores[1])


def test_out_of_memory_makes_batches_smaller_and_loses_nothing():
    model = Model(memory=30)
    scheduler = Scheduler(model, token_budget=100)
    try:
        result = scheduler.submit(Caller(), group(*range(1, 9))).result(30)
    finally:
        scheduler.close()

    assert result.scores.tolist() == list(range(1, 9))
    assert scheduler.token_budget < 100


def test_a_document_that_never_fits_is_a_typed_error(scheduler):
    result = scheduler.submit(Caller(), group(1, HUGE, 2)).result(30)

    assert isinstance(result.failed[1], DeviceOutOfMemoryError)
    assert result.scores[[0, 2]].tolist() == [1, 2]


@pytest.mark.parametrize("crash", [CRASH, "device"])
def test_a_crashed_worker_fails_its_callers_and_recovers(model, crash):
    """Nobody waits for ever, and the next call is scored."""

    def run(batch):
        if crash == "device" and not model.batches:
            model.batches.append([])
            raise DeviceLostError("the device is gone")
        return model(batch)

    scheduler = Scheduler(run, token_budget=100)
    first = 1 if crash == "device" else crash
    try:
        with pytest.raises(ScorerError, match="worker failed"):
            scheduler.submit(Caller(), group(first)).result(30)
        assert scheduler.submit(Caller(), group(7)).result(30).scores.tolist() == [7]
    finally:
        scheduler.close()


def test_a_crash_also_fails_those_who_only_wait(model, scheduler):
    hold(model, scheduler, CRASH)
    waiting = scheduler.submit(Caller(), group(1))
    model.gate.set()

    with pytest.raises(ScorerError, match="worker failed"):
        waiting.result(30)


def test_a_small_call_waits_at_most_two_batches_behind_a_huge_one(model, scheduler):
    hold(model, scheduler, *range(100, 200))
    small = scheduler.submit(Caller(), group(1, 2, 3))
    model.gate.set()
    small.result(30)
    with_small = next(i for i, batch in enumerate(model.batches) if 1 in batch)

    assert with_small <= 1
    assert {1, 2, 3} <= set(model.batches[with_small])


def test_a_stream_of_small_calls_cannot_starve_a_huge_one(model, scheduler):
    hold(model, scheduler, *range(100, 160))
    small = [scheduler.submit(Caller(), group(first)) for first in range(1, 60)]
    model.gate.set()
    for future in small:
        future.result(30)

    assert all(any(first >= 100 for first in batch) for batch in model.batches[:10])


def test_concurrent_callers_share_packs(model, scheduler):
    hold(model, scheduler, 50)
    futures = [scheduler.submit(Caller(), group(first)) for first in range(8)]
    model.gate.set()

    assert [future.result(30).scores.tolist() for future in futures] == [[float(first)] for first in range(8)]
    assert len(model.batches) == 2


def test_a_cancelled_callers_documents_are_never_computed(model, scheduler):
    hold(model, scheduler, 50)
    caller = Caller()
    futures = [scheduler.submit(caller, group(first)) for first in (1, 2)]
    kept = scheduler.submit(Caller(), group(3))
    scheduler.cancel(caller)
    model.gate.set()
    kept.result(30)

    assert all(future.cancelled() for future in futures)
    assert model.batches == [[50], [3]]
    with pytest.raises(CancelledError):
        scheduler.submit(caller, group(4)).result(30)


def test_a_caller_cancelled_while_computed_disturbs_nobody(model, scheduler):
    caller = hold(model, scheduler, *range(20))
    scheduler.cancel(caller)
    other = scheduler.submit(Caller(), group(1))
    model.gate.set()

    assert other.result(30).scores.tolist() == [1]
    assert scheduler.waiting_tokens == 0
    assert len(model.batches) == 2


def test_close_finishes_what_waits_and_refuses_the_rest(model, scheduler):
    hold(model, scheduler, 1)
    waiting = scheduler.submit(Caller(), group(*range(40)))
    closer = threading.Thread(target=scheduler.close)
    closer.start()
    model.gate.set()
    closer.join(30)

    assert waiting.result(0).scores.tolist() == list(range(40))
    with pytest.raises(ScorerClosedError, match="closed"):
        scheduler.submit(Caller(), group(1))


def test_64_threads_get_exactly_their_own_scores(scheduler):
    def call(seed: int) -> bool:
        firsts = np.random.default_rng(seed).integers(0, 900, size=seed % 7 + 1).tolist()
        return scheduler.submit(Caller(), group(*firsts)).result(60).scores.tolist() == firsts

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(call, range(500)))
    assert scheduler.waiting_tokens == 0


async def test_coroutines_wait_without_threads_of_their_own(scheduler):
    before = threading.active_count()
    futures = [scheduler.submit(Caller(), group(first)) for first in range(50)]
    results = await asyncio.gather(*map(asyncio.wrap_future, futures))

    assert [result.scores[0] for result in results] == list(range(50))
    assert threading.active_count() <= before + 1


def test_dropping_a_scheduler_ends_its_thread(model):
    scheduler = Scheduler(model, token_budget=100)
    scheduler.submit(Caller(), group(1)).result(30)
    [thread] = [t for t in threading.enumerate() if t.name.startswith("qwen-rerank-device") and t.is_alive()][-1:]
    del scheduler
    gc.collect()
    thread.join(10)

    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_refused_and_the_parent_goes_on(scheduler):
    scheduler.submit(Caller(), group(1)).result(30)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            scheduler.submit(Caller(), group(2))
        except ScorerClosedError as exc:
            code = 0 if "forked process" in str(exc) else 2
        finally:
            scheduler.close()  # must not hang on a lock or thread of the parent
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert scheduler.submit(Caller(), group(3)).result(30).scores.tolist() == [3]


_ABANDONED = """
import time, threading, numpy as np
from qwen_rerank.scorers.qwen.packing import QueryGroup
from qwen_rerank.scorers.qwen.scheduler import Caller, Scheduler
def slow(batch):
    time.sleep(0.05)
    return np.ones(batch.n_documents, np.float32)
scheduler = Scheduler(slow, token_budget=4)
documents = tuple(np.ones(2, np.int32) for _ in range(100_000))
future = scheduler.submit(Caller(), QueryGroup(np.zeros(1, np.int32), documents))
threading.Thread(target=lambda: print(type(future.exception()).__name__), daemon=False).start()
time.sleep(0.2)
"""


def test_the_interpreter_ends_although_work_is_left():
    """Hours of queued work neither keep the process alive nor leave a waiting thread without an answer."""
    done = subprocess.run([sys.executable, "-c", _ABANDONED], capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "ScorerClosedError", "")
