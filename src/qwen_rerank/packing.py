"""Segments into packs: the common prefix of a query's prompts, and what fits one forward pass. Pure, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """What the prompts of many queries begin with; compared by its ids.

    Attributes:
        ids: int32 `(n,)`, token ids.
    """

    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opening) and self.ids.tobytes() == other.ids.tobytes()

    def __hash__(self) -> int:
        return hash(self.ids.tobytes())


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Tree:
    """One query with its documents; compared by identity.

    Attributes:
        prefix: int32 `(n_prefix,)`, the token ids that all prompts of this query begin with.
        documents: The remaining ids of each prompt, int32 `(n,)` with n >= 1; each attends to the prefix and to itself.
        opening: What the prefix begins with and other queries share, shorter than the prefix; None where nothing is.
        whole: The tree that this one is a part of, whose prefix is computed once for all parts; None for a whole one.
    """

    prefix: np.ndarray
    documents: tuple[np.ndarray, ...]
    opening: Opening | None = None
    whole: Tree | None = None

    @property
    def root(self) -> Tree:
        """The whole tree: what is kept of the prefix is kept under it."""
        return self if self.whole is None else self.whole

    def part(self, start: int, stop: int) -> Tree:
        """Return the tree of the documents from `start` up to `stop`, which shares the prefix with the other parts."""
        if (start, stop) == (0, len(self.documents)):
            return self
        return Tree(self.prefix, self.documents[start:stop], self.opening, self.root)

    @property
    def tokens(self) -> int:
        """Tokens to compute when the tree lies in one pack and nothing is at hand."""
        return len(self.prefix) + sum(map(len, self.documents))


@dataclass(frozen=True, slots=True)
class Branch:
    """The documents of one tree that lie in one pack.

    Attributes:
        tree: The tree.
        indices: Which of its documents, longest first.
        more: Whether other documents of the tree come in a later pack, so that its prefix is worth keeping.
    """

    tree: Tree
    indices: tuple[int, ...]
    more: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the prefix and of these documents."""
        return len(self.tree.prefix) + sum(len(self.tree.documents[i]) for i in self.indices)


@dataclass(frozen=True, slots=True)
class Pack:
    """What one forward pass computes."""

    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(branch.tokens for branch in self.branches)

    @property
    def n_documents(self) -> int:
        """Documents scored by this pack."""
        return sum(len(branch.indices) for branch in self.branches)

    def halves(self) -> tuple[Pack, Pack]:
        """Return two packs with the same documents; needs at least two."""
        places = [(branch, index) for branch in self.branches for index in branch.indices]
        middle = len(places) // 2
        return _regroup(places[:middle]), _regroup(places[middle:])


def _regroup(places: Sequence[tuple[Branch, int]]) -> Pack:
    indices: dict[int, list[int]] = {}
    branches = {id(branch): branch for branch, _ in places}
    for branch, index in places:
        indices.setdefault(id(branch), []).append(index)
    return Pack(tuple(Branch(branches[key].tree, tuple(chosen), more=True) for key, chosen in indices.items()))


def common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Return how many leading ids all prompts share, at least one fewer than the shortest prompt has."""
    first = prompts[0]
    limit = min(map(len, prompts)) - 1
    for other in prompts[1:]:
        differing = np.flatnonzero(first[:limit] != other[:limit])
        if differing.size:
            limit = int(differing[0])
    return limit


def grow(prompts: Sequence[np.ndarray], *, cut: int | None = None, opening: Opening | None = None) -> Tree:
    """Return the tree of one query's prompts.

    Args:
        prompts: Token ids of whole prompts, each int32 `(n,)`, at least one.
        cut: Length of the prefix where it must not depend on the other documents; the longest common one otherwise.
        opening: What other queries may share; taken where these prompts do begin with it.
    """
    length = common_prefix(prompts) if cut is None else cut
    prefix = prompts[0][:length]
    begins = opening is not None and 0 < len(opening) < length and np.array_equal(prefix[: len(opening)], opening.ids)
    return Tree(prefix, tuple(prompt[length:] for prompt in prompts), opening if begins else None)


class Waiting:
    """A tree's documents that no pack has taken yet, longest first."""

    def __init__(self, tree: Tree) -> None:
        lengths = [len(document) for document in tree.documents]
        # Longest first: a budget that is too large for the device fails at once and not after minutes of work.
        self._order = deque(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
        self._tokens = sum(lengths)
        self.tree = tree

    @property
    def tokens(self) -> int:
        """Tokens that are left to compute, the prefix included; 0 when nothing is left."""
        return len(self.tree.prefix) + self._tokens if self._order else 0

    @property
    def smallest_step(self) -> int:
        """Tokens of the next document with its prefix: what a pack must have room for; 0 when nothing is left."""
        return len(self.tree.prefix) + len(self.tree.documents[self._order[0]]) if self._order else 0

    def take(self, room: int, *, force: bool = False) -> Branch | None:
        """Take the next documents that fit `room` tokens; with `force` at least one, however long it is."""
        chosen: list[int] = []
        room -= len(self.tree.prefix)
        while self._order:
            length = len(self.tree.documents[self._order[0]])
            if length > room and not (force and not chosen):
                break
            room -= length
            self._tokens -= length
            chosen.append(self._order.popleft())
        more = bool(self._order) or self.tree.whole is not None  # another part may come
        return Branch(self.tree, tuple(chosen), more=more) if chosen else None


def fill(waiting: Iterable[Waiting], room: int, *, force: bool = False) -> list[Branch]:
    """Take from each in turn what still fits `room` tokens; with `force` at least one document of the first."""
    branches: list[Branch] = []
    for item in waiting:
        branch = item.take(room, force=force and not branches)
        if branch is None:
            break
        branches.append(branch)
        room -= branch.tokens
    return branches
