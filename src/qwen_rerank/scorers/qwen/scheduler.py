"""One worker owns the device; callers hand it groups and wait for their scores."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from qwen_rerank.errors import DeviceOutOfMemoryError, NonFiniteScoreError, ScorerClosedError, ScorerError
from qwen_rerank.scorers.qwen.packing import GroupSlice, PackedBatch, QueryGroup, Waiting, fill

logger = logging.getLogger(__name__)


class DeviceLostError(ScorerError):
    """The device cannot compute any more; trying again in this process would not help."""


@dataclass(frozen=True, slots=True)
class GroupScores:
    """A group's result: float32 `(n_documents,)` with NaN at the failed indices, and why they failed."""

    scores: np.ndarray
    failed: dict[int, Exception]


@dataclass(eq=False)
class _Submission:
    """One submitted group and what is known of it so far."""

    waiting: Waiting
    future: Future[GroupScores]
    result: GroupScores
    pending: int


@dataclass(eq=False)
class Caller:
    """One call of a user; its groups share one place in the queue."""

    cancelled: bool = False
    submissions: list[_Submission] = field(default_factory=list)

    @property
    def waiting(self) -> list[Waiting]:
        """The documents that no batch has taken yet, in order of submission."""
        return [submission.waiting for submission in self.submissions if submission.waiting.tokens]

    @property
    def tokens(self) -> int:
        """Tokens that no batch has taken yet."""
        return sum(waiting.tokens for waiting in self.waiting)


class Scheduler:
    """Batches what is waiting, runs it, and gives every caller its own scores.

    The worker is a pool of one thread that is busy only while something waits: the standard library ends it when the
    scheduler is dropped or the interpreter exits, so nothing is left to leak.

    Args:
        run: Computes one batch; returns float32 `(n_documents,)` in the batch's order. Raises
            `DeviceOutOfMemoryError` when the batch is too large and `DeviceLostError` when the device is gone.
        token_budget: Tokens of one batch.
    """

    def __init__(self, run: Callable[[PackedBatch], np.ndarray], *, token_budget: int) -> None:
        self._run = run
        self._budget = token_budget
        self._callers: list[Caller] = []  # in order of arrival
        self._submissions: dict[QueryGroup, tuple[Caller, _Submission]] = {}
        self._lock = threading.Condition()  # notified when the worker rests
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="qwen-rerank-device")
        self._pumping = False
        self._closed = False
        self._pid = os.getpid()

    @property
    def token_budget(self) -> int:
        """Tokens of one batch; smaller than at the start after the device ran out of memory."""
        return self._budget

    @property
    def waiting_tokens(self) -> int:
        """Tokens that no batch has taken yet."""
        with self._lock:
            return sum(caller.tokens for caller in self._callers)

    def check_open(self) -> None:
        """Raise `ScorerClosedError` after `close`, or in a process forked from the one that made this."""
        if os.getpid() != self._pid:
            raise ScorerClosedError(
                f"this scorer belongs to process {self._pid} and cannot be used in the forked process {os.getpid()}; "
                "make a new one after the fork, or start processes with the 'spawn' method."
            )
        if self._closed:
            raise ScorerClosedError("this scorer is closed; make a new one.")

    def submit(self, caller: Caller, group: QueryGroup) -> Future[GroupScores]:
        """Queue a group; the future holds its scores, or a `ScorerError` when the worker failed."""
        self.check_open()
        future: Future[GroupScores] = Future()
        result = GroupScores(np.full(len(group.documents), np.nan, dtype=np.float32), {})
        submission = _Submission(Waiting(group), future, result, pending=len(group.documents))
        with self._lock:
            self.check_open()
            if caller.cancelled:
                future.cancel()
                return future
            if caller not in self._callers:
                self._callers.append(caller)
            caller.submissions.append(submission)
            self._submissions[group] = (caller, submission)
            self._wake()
        return future

    def cancel(self, caller: Caller) -> None:
        """Drop what this caller still waits for; batches that are being computed are not interrupted."""
        with self._lock:
            caller.cancelled = True
            futures = [submission.future for submission in caller.submissions]
            self._forget(caller)
        for future in futures:
            future.cancel()

    def close(self) -> None:
        """Take nothing new, finish what waits, and end the worker."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._pumping)
        self._worker.shutdown(wait=True)

    def _wake(self) -> None:
        """Start the worker where it rests; holds the lock."""
        if self._pumping:
            return
        try:
            self._worker.submit(self._pump)
        except RuntimeError as exc:
            for caller in list(self._callers):
                self._forget(caller)
            raise ScorerClosedError("the interpreter is shutting down; nothing can be scored any more.") from exc
        self._pumping = True

    def _forget(self, caller: Caller) -> None:
        """Take a caller out of the queue; holds the lock."""
        for submission in caller.submissions:
            self._submissions.pop(submission.waiting.group, None)
        caller.submissions.clear()
        if caller in self._callers:
            self._callers.remove(caller)

    def _pump(self) -> None:
        """Run one batch and queue up for the next: the pool refuses once the interpreter is shutting down."""
        try:
            batch = self._next_batch()
            if batch is None:
                return
            self._attempt(batch)
        except BaseException as exc:  # a worker that dies silently would leave its callers waiting for ever
            logger.exception("The scorer's worker failed; its callers get an error and it starts again.")
            error = ScorerError(f"the scorer's worker failed ({type(exc).__name__}: {exc}); the call can be repeated.")
            error.__cause__ = exc
            self._fail_all(error)
            return
        try:
            self._worker.submit(self._pump)
        except RuntimeError:
            self._fail_all(ScorerClosedError("the interpreter is shutting down; the document was not scored."))

    def _next_batch(self) -> PackedBatch | None:
        """Return the next batch, or None and rest."""
        with self._lock:
            slices = self._choose()
            if slices:
                return PackedBatch(tuple(slices))
            self._rest()
            return None

    def _rest(self) -> None:
        """Let the next call start the worker again; holds the lock."""
        self._pumping = False
        self._lock.notify_all()

    def _choose(self) -> list[GroupSlice]:
        """Fill a batch: half for the caller that waits longest, half for those with least left.

        So a small call overtakes a huge one, and no stream of small calls can starve it.
        """
        # 1. what the oldest caller is sure to get: half, or the one document that must fit, or all that it has left
        callers = [caller for caller in self._callers if caller.tokens]
        if not callers:
            return []
        oldest, *others = callers
        step = next(waiting.smallest_step for waiting in oldest.waiting)
        reserved = min(oldest.tokens, max(self._budget // 2, step))
        # 2. the others, least left first
        slices: list[GroupSlice] = []
        room = self._budget
        for caller in sorted(others, key=lambda caller: caller.tokens):
            taken = fill(caller.waiting, room - reserved)
            room -= sum(group_slice.tokens for group_slice in taken)
            slices += taken
        # 3. the oldest, with whatever the others left of the budget
        return fill(oldest.waiting, room, force=True) + slices

    def _attempt(self, batch: PackedBatch) -> None:
        """Run a batch; where it fails, run its halves, so that only the documents at fault fail."""
        try:
            scores = self._run(batch)
        except DeviceLostError:
            raise
        except Exception as exc:
            if isinstance(exc, DeviceOutOfMemoryError):
                self._shrink(batch)
            if batch.n_documents == 1:
                self._settle(batch, [_document_error(exc)])
                return
        else:
            self._settle(batch, scores)
            return
        for half in batch.halves():
            self._attempt(half)

    def _shrink(self, batch: PackedBatch) -> None:
        smaller = max(1, min(self._budget, batch.tokens) // 2)
        if batch.n_documents > 1:
            logger.warning(
                "Out of device memory at %d tokens; batches hold %d tokens from now on.", batch.tokens, smaller
            )
            self._budget = smaller

    def _settle(self, batch: PackedBatch, outcomes: np.ndarray | list[Exception]) -> None:
        """Hand the outcomes, in the batch's order, to the callers."""
        values = iter(outcomes)
        done: list[_Submission] = []
        with self._lock:
            for group_slice in batch.slices:
                _, submission = self._submissions.get(group_slice.group, (None, None))
                for index in group_slice.indices:
                    outcome = next(values)
                    if submission is not None:
                        _note(submission, index, outcome)
                if submission is not None and submission.pending == 0:
                    done.append(submission)
                    self._finish(group_slice.group)
        for submission in done:
            if submission.future.set_running_or_notify_cancel():
                submission.future.set_result(submission.result)

    def _finish(self, group: QueryGroup) -> None:
        """Take a finished group out of the queue; holds the lock."""
        caller, submission = self._submissions.pop(group)
        caller.submissions.remove(submission)
        if not caller.submissions:
            self._callers.remove(caller)

    def _fail_all(self, error: ScorerError) -> None:
        """Give every waiting caller this error, and rest."""
        with self._lock:
            futures = [submission.future for caller in self._callers for submission in caller.submissions]
            for caller in list(self._callers):
                self._forget(caller)
            self._rest()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _note(submission: _Submission, index: int, outcome: float | Exception) -> None:
    submission.pending -= 1
    if isinstance(outcome, Exception):
        submission.result.failed[index] = outcome
    elif np.isfinite(outcome):
        submission.result.scores[index] = outcome
    else:
        submission.result.failed[index] = NonFiniteScoreError(f"the model gave {outcome} for this document.")


def _document_error(exc: Exception) -> Exception:
    if isinstance(exc, ScorerError):
        return exc
    error = ScorerError(f"the model failed on this document ({type(exc).__name__}: {exc}).")
    error.__cause__ = exc
    return error
