"""One worker owns the device; callers hand it trees and wait for their scores."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from qwen_rerank.errors import DeviceOutOfMemoryError, NonFiniteScoreError, ScorerClosedError, ScorerError
from qwen_rerank.packing import Branch, Pack, Tree, Waiting, fill

logger = logging.getLogger(__name__)


class DeviceLostError(ScorerError):
    """The device cannot compute any more; trying again in this process would not help."""


@dataclass(frozen=True, slots=True)
class TreeScores:
    """A tree's result: float32 `(n_documents,)` with NaN at the failed indices, and why they failed."""

    scores: np.ndarray
    failed: dict[int, Exception]


@dataclass(eq=False)
class _Order:
    """One submitted tree and what is known of it so far."""

    waiting: Waiting
    future: Future[TreeScores]
    result: TreeScores
    pending: int


@dataclass(eq=False)
class Caller:
    """One call of a user; its trees share one place in the queue."""

    cancelled: bool = False
    orders: list[_Order] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that no pack has taken yet."""
        return sum(order.waiting.tokens for order in self.orders)


class Scheduler:
    """Packs what is waiting, runs it, and gives every caller its own scores.

    The worker is a pool of one thread that is busy only while something waits: the standard library ends it when the
    scheduler is dropped or the interpreter exits, so nothing is left to leak.

    Args:
        run: Computes one pack; returns float32 `(n_documents,)` in the pack's order. Raises
            `DeviceOutOfMemoryError` when the pack is too large and `DeviceLostError` when the device is gone.
        token_budget: Tokens of one pack.
    """

    def __init__(self, run: Callable[[Pack], np.ndarray], *, token_budget: int) -> None:
        self._run = run
        self._budget = token_budget
        self._callers: list[Caller] = []  # in order of arrival
        self._orders: dict[Tree, tuple[Caller, _Order]] = {}
        self._lock = threading.Condition()  # notified when the worker rests
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="qwen-rerank-device")
        self._pumping = False
        self._closed = False
        self._pid = os.getpid()

    @property
    def token_budget(self) -> int:
        """Tokens of one pack; smaller than at the start after the device ran out of memory."""
        return self._budget

    @property
    def waiting_tokens(self) -> int:
        """Tokens that no pack has taken yet."""
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

    def submit(self, caller: Caller, tree: Tree) -> Future[TreeScores]:
        """Queue a tree; the future holds its scores, or a `ScorerError` when the worker failed."""
        self.check_open()
        future: Future[TreeScores] = Future()
        result = TreeScores(np.full(len(tree.documents), np.nan, dtype=np.float32), {})
        order = _Order(Waiting(tree), future, result, pending=len(tree.documents))
        with self._lock:
            self.check_open()
            if caller.cancelled:
                future.cancel()
                return future
            if caller not in self._callers:
                self._callers.append(caller)
            caller.orders.append(order)
            self._orders[tree] = (caller, order)
            self._wake()
        return future

    def cancel(self, caller: Caller) -> None:
        """Drop what this caller still waits for; packs that are being computed are not interrupted."""
        with self._lock:
            caller.cancelled = True
            futures = [order.future for order in caller.orders]
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
        for order in caller.orders:
            self._orders.pop(order.waiting.tree, None)
        caller.orders.clear()
        if caller in self._callers:
            self._callers.remove(caller)

    def _pump(self) -> None:
        """Run one pack and queue up for the next: the pool refuses once the interpreter is shutting down."""
        try:
            pack = self._next_pack()
            if pack is None:
                return
            self._attempt(pack)
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

    def _next_pack(self) -> Pack | None:
        """Return the next pack, or None and rest."""
        with self._lock:
            branches = self._choose()
            if branches:
                return Pack(tuple(branches))
            self._rest()
            return None

    def _rest(self) -> None:
        """Let the next call start the worker again; holds the lock."""
        self._pumping = False
        self._lock.notify_all()

    def _choose(self) -> list[Branch]:
        """Fill a pack: half for the caller that waits longest, half for those with least left.

        So a small call overtakes a huge one, and no stream of small calls can starve it.
        """
        callers = [caller for caller in self._callers if caller.tokens]
        if not callers:
            return []
        oldest, *others = callers
        step = next(order.waiting.smallest_step for order in oldest.orders if order.waiting.tokens)
        reserved = min(oldest.tokens, max(self._budget // 2, step))
        branches: list[Branch] = []
        room = self._budget
        for caller in sorted(others, key=lambda caller: caller.tokens):
            taken = fill((order.waiting for order in caller.orders if order.waiting.tokens), room - reserved)
            room -= sum(branch.tokens for branch in taken)
            branches += taken
        first = fill((order.waiting for order in oldest.orders if order.waiting.tokens), room, force=True)
        return first + branches

    def _attempt(self, pack: Pack) -> None:
        """Run a pack; where it fails, run its halves, so that only the documents at fault fail."""
        try:
            scores = self._run(pack)
        except DeviceLostError:
            raise
        except Exception as exc:
            if isinstance(exc, DeviceOutOfMemoryError):
                self._shrink(pack)
            if pack.n_documents == 1:
                self._settle(pack, [_document_error(exc)])
                return
        else:
            self._settle(pack, scores)
            return
        for half in pack.halves():
            self._attempt(half)

    def _shrink(self, pack: Pack) -> None:
        smaller = max(1, min(self._budget, pack.tokens) // 2)
        if pack.n_documents > 1:
            logger.warning("Out of device memory at %d tokens; packs hold %d tokens from now on.", pack.tokens, smaller)
            self._budget = smaller

    def _settle(self, pack: Pack, outcomes: np.ndarray | list[Exception]) -> None:
        """Hand the outcomes, in the pack's order, to the callers."""
        values = iter(outcomes)
        done: list[_Order] = []
        with self._lock:
            for branch in pack.branches:
                _, order = self._orders.get(branch.tree, (None, None))
                for index in branch.indices:
                    outcome = next(values)
                    if order is not None:
                        _note(order, index, outcome)
                if order is not None and order.pending == 0:
                    done.append(order)
                    self._finish(branch.tree)
        for order in done:
            if order.future.set_running_or_notify_cancel():
                order.future.set_result(order.result)

    def _finish(self, tree: Tree) -> None:
        """Take a finished tree out of the queue; holds the lock."""
        caller, order = self._orders.pop(tree)
        caller.orders.remove(order)
        if not caller.orders:
            self._callers.remove(caller)

    def _fail_all(self, error: ScorerError) -> None:
        """Give every waiting caller this error, and rest."""
        with self._lock:
            futures = [order.future for caller in self._callers for order in caller.orders]
            for caller in list(self._callers):
                self._forget(caller)
            self._rest()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _note(order: _Order, index: int, outcome: float | Exception) -> None:
    order.pending -= 1
    if isinstance(outcome, Exception):
        order.result.failed[index] = outcome
    elif np.isfinite(outcome):
        order.result.scores[index] = outcome
    else:
        order.result.failed[index] = NonFiniteScoreError(f"the model gave {outcome} for this document.")


def _document_error(exc: Exception) -> Exception:
    if isinstance(exc, ScorerError):
        return exc
    error = ScorerError(f"the model failed on this document ({type(exc).__name__}: {exc}).")
    error.__cause__ = exc
    return error
