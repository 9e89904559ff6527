"""Shares: a batch as batches that are computed side by side, each by threads of its own. Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import log2

from qwen_rerank.scorers.qwen.packing import GroupSlice, PackedBatch, QueryGroup, regroup

_KEYS = 4096  # a row's attention to so many keys costs about as much as its products with the weights
_WAITING = 0.18  # of the time, for each doubling of the threads within an operation; measured for two
_SHARE_ROWS = 128  # fewer rows do not bring a thread's products to full speed
_PREFIX_ROWS = 64  # of prefixes that several shares need: more are computed once, before the shares


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a batch.

    Attributes:
        batch: The part; prefixes alone where it has no documents.
        places: Where its documents lie in the whole batch, in order.
    """

    batch: PackedBatch
    places: Sequence[int]


Step = Sequence[Share]  # what is computed side by side


def share_out(batch: PackedBatch, n_threads: int, *, n_new: Callable[[QueryGroup], int], room: int) -> Sequence[Step]:
    """Return a batch as steps of shares that take about equally long.

    A thread with rows of its own waits for no other between two operations. Where shares would be uneven, the longest
    documents, or all of them, are a step of one share: in its operations all threads take part.

    Args:
        batch: What is to be computed.
        n_threads: Threads of the device.
        n_new: Returns how many rows a group's prefix takes: fewer than its tokens where some are at hand.
        room: Tokens of prefixes that can be kept from step to step.
    """
    whole = [[Share(batch, range(batch.n_documents))]]
    if n_threads < 2 or batch.n_documents < 2:
        return whole
    plans = _Plans(batch, n_threads, n_new, room)
    cost, steps = min((plans.steps(n) for n in range(min(n_threads, batch.n_documents))), key=lambda plan: plan[0])
    return steps if cost < plans.together(range(batch.n_documents)) else whole


class _Plans:
    """The costs of a batch's documents, and the ways to share them out; arguments as of `share_out`."""

    def __init__(self, batch: PackedBatch, n_threads: int, n_new: Callable[[QueryGroup], int], room: int) -> None:
        self._documents = [(part, index) for part in batch.slices for index in part.indices]
        self._rows = [len(part.group.documents[index]) for part, index in self._documents]
        self._roots = [part.group.root for part, _ in self._documents]
        self._costs = [_cost(n, len(root.prefix)) for n, root in zip(self._rows, self._roots, strict=True)]
        self._new_rows = {root: n_new(root) for root in dict.fromkeys(self._roots)}
        self._longest_first = sorted(range(len(self._rows)), key=self._costs.__getitem__, reverse=True)
        self._n_threads, self._room = n_threads, room

    def together(self, places: Sequence[int]) -> float:
        """Return the cost of these documents with their prefixes, all threads in every operation."""
        return self._alone(places, set()) / _speed(self._n_threads)

    def steps(self, n_first: int) -> tuple[float, Sequence[Step]]:
        """Return the cost and the steps of the `n_first` longest documents together and the others in shares."""
        first, rest = self._longest_first[:n_first], self._longest_first[n_first:]
        n_shares = min(self._n_threads, len(rest), sum(self._rows[place] for place in rest) // _SHARE_ROWS)
        if n_shares < 2:
            return float("inf"), []
        # 1. the others, longest first, each to the share that has least to do
        shares: list[list[int]] = [[] for _ in range(n_shares)]
        loads = [(0.0, i) for i in range(n_shares)]
        for place in rest:
            load, i = heappop(loads)
            shares[i].append(place)
            heappush(loads, (load + self._costs[place], i))
        # 2. prefixes that come before them: the longest documents' own, or those worth a step
        early = {self._roots[place] for place in first} or self._repeated(shares)
        early = early if sum(len(root.prefix) for root in early) <= self._room else set()
        cost, steps = 0.0, []
        if first:
            cost, steps = self.together(first), [[self._share(sorted(first), more=True)]]
        elif early:
            prefixes = tuple(GroupSlice(root, (), more=True) for root in self._new_rows if root in early)
            cost = sum(map(self._prefix_cost, early)) / _speed(self._n_threads)
            steps = [[Share(PackedBatch(prefixes), [])]]
        # 3. the step of the shares takes as long as its longest
        cost += max(self._alone(share, early) for share in shares) / _speed(self._n_threads // n_shares)
        return cost, [*steps, [self._share(sorted(share), more=False) for share in shares]]

    def _repeated(self, shares: Sequence[Sequence[int]]) -> set[QueryGroup]:
        """Return the groups whose prefix several shares need, where those are worth a step of their own."""
        seen: set[QueryGroup] = set()
        again: set[QueryGroup] = set()
        for share in shares:
            roots = {self._roots[place] for place in share}
            again |= seen & roots
            seen |= roots
        again = {root for root in again if self._new_rows[root]}
        return again if sum(self._new_rows[root] for root in again) > _PREFIX_ROWS else set()

    def _alone(self, places: Sequence[int], early: set[QueryGroup]) -> float:
        """Return what one thread takes for these documents and their prefixes but the early ones."""
        roots = {self._roots[place] for place in places} - early
        return sum(map(self._prefix_cost, roots)) + sum(self._costs[place] for place in places)

    def _prefix_cost(self, root: QueryGroup) -> float:
        return _cost(self._new_rows[root], len(root.prefix) - self._new_rows[root])

    def _share(self, places: list[int], *, more: bool) -> Share:
        return Share(regroup([self._documents[place] for place in places], more=more), places)


def _speed(n_threads: int) -> float:
    """Return how many times as fast as one thread these are within every operation."""
    return n_threads / (1 + _WAITING * log2(n_threads))


def _cost(n_rows: int, n_before: int) -> float:
    """Return what rows cost that see each other causally and some before them, in rows that see nothing."""
    return n_rows * (1 + (n_before + n_rows / 2) / _KEYS)
