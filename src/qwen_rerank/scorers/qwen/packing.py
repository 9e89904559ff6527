"""Packing: a query's prompts as one group, groups as batches, a batch as rows of one matrix. Pure, no torch.

prompts ─▶ QueryGroup (prefix once, the rest of each prompt) ─▶ PackedBatch (slices of groups under a token budget)
        ─▶ Layout (which token lies in which row, and which rows each row attends to)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """The tokens that the prompts of many queries begin with; compared by its ids.

    Attributes:
        ids: int32 `(n,)`, token ids.
    """

    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedPrefix) and self.ids.tobytes() == other.ids.tobytes()

    def __hash__(self) -> int:
        return hash(self.ids.tobytes())


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class QueryGroup:
    """One query with its documents; compared by identity.

    Attributes:
        prefix: int32 `(n_prefix,)`, the token ids that all prompts of this query begin with.
        documents: The remaining ids of each prompt, int32 `(n,)` with n >= 1; each attends to the prefix and to itself.
        shared_prefix: What the prefix begins with and other queries share, shorter than the prefix; None where nothing is.
        whole: The group that this one is a part of, whose prefix is computed once for all parts; None for a whole one.
    """

    prefix: np.ndarray
    documents: tuple[np.ndarray, ...]
    shared_prefix: SharedPrefix | None = None
    whole: QueryGroup | None = None

    @property
    def root(self) -> QueryGroup:
        """The whole group: what is kept of the prefix is kept under it."""
        return self if self.whole is None else self.whole

    def subgroup(self, start: int, stop: int) -> QueryGroup:
        """Return the group of the documents from `start` up to `stop`, which shares the prefix with the other parts."""
        if (start, stop) == (0, len(self.documents)):
            return self
        return QueryGroup(self.prefix, self.documents[start:stop], self.shared_prefix, self.root)

    @property
    def tokens(self) -> int:
        """Tokens to compute when the group lies in one batch and nothing is at hand."""
        return len(self.prefix) + sum(map(len, self.documents))


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """The documents of one group that lie in one batch.

    Attributes:
        group: The group.
        indices: Which of its documents, longest first.
        more: Whether other documents of the group come in a later batch, so that its prefix is worth keeping.
    """

    group: QueryGroup
    indices: tuple[int, ...]
    more: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the prefix and of these documents."""
        return len(self.group.prefix) + sum(len(self.group.documents[i]) for i in self.indices)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The documents of one forward pass, as slices of their groups."""

    slices: tuple[GroupSlice, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(group_slice.tokens for group_slice in self.slices)

    @property
    def n_documents(self) -> int:
        """Documents scored by this batch."""
        return sum(len(group_slice.indices) for group_slice in self.slices)

    def halves(self) -> tuple[PackedBatch, PackedBatch]:
        """Return two batches with the same documents; needs at least two."""
        places = [(group_slice, index) for group_slice in self.slices for index in group_slice.indices]
        middle = len(places) // 2
        return regroup(places[:middle], more=True), regroup(places[middle:], more=True)


def regroup(places: Sequence[tuple[GroupSlice, int]], *, more: bool) -> PackedBatch:
    """Return a batch of some documents, each an index of a slice; with `more`, other documents come in a later batch."""
    indices: dict[int, list[int]] = {}
    slices = {id(group_slice): group_slice for group_slice, _ in places}
    for group_slice, index in places:
        indices.setdefault(id(group_slice), []).append(index)
    return PackedBatch(
        tuple(GroupSlice(slices[key].group, tuple(chosen), more or slices[key].more) for key, chosen in indices.items())
    )


def common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Return how many leading ids all prompts share, at least one fewer than the shortest prompt has."""
    first = prompts[0]
    limit = min(map(len, prompts)) - 1
    for other in prompts[1:]:
        differing = np.flatnonzero(first[:limit] != other[:limit])
        if differing.size:
            limit = int(differing[0])
    return limit


def group_prompts(
    prompts: Sequence[np.ndarray], *, cut: int | None = None, shared_prefix: SharedPrefix | None = None
) -> QueryGroup:
    """Return the group of one query's prompts, whose longest common prefix is computed once for all of them.

    Args:
        prompts: Token ids of whole prompts, each int32 `(n,)`, at least one.
        cut: Length of the prefix where it must not depend on the other documents; the longest common one otherwise.
        shared_prefix: What other queries may share; taken where these prompts do begin with it.
    """
    length = common_prefix(prompts) if cut is None else cut
    prefix = prompts[0][:length]
    begins = (
        shared_prefix is not None
        and 0 < len(shared_prefix) < length
        and np.array_equal(prefix[: len(shared_prefix)], shared_prefix.ids)
    )
    return QueryGroup(prefix, tuple(prompt[length:] for prompt in prompts), shared_prefix if begins else None)


class Waiting:
    """A group's documents that no batch has taken yet, longest first."""

    def __init__(self, group: QueryGroup) -> None:
        lengths = [len(document) for document in group.documents]
        # Longest first: a budget that is too large for the device fails at once and not after minutes of work.
        self._order = deque(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
        self._tokens = sum(lengths)
        self.group = group

    @property
    def tokens(self) -> int:
        """Tokens that are left to compute, the prefix included; 0 when nothing is left."""
        return len(self.group.prefix) + self._tokens if self._order else 0

    @property
    def smallest_step(self) -> int:
        """Tokens of the next document with its prefix: what a batch must have room for; 0 when nothing is left."""
        return len(self.group.prefix) + len(self.group.documents[self._order[0]]) if self._order else 0

    def take(self, room: int, *, force: bool = False) -> GroupSlice | None:
        """Take the next documents that fit `room` tokens; with `force` at least one, however long it is."""
        chosen: list[int] = []
        room -= len(self.group.prefix)
        while self._order:
            length = len(self.group.documents[self._order[0]])
            if length > room and not (force and not chosen):
                break
            room -= length
            self._tokens -= length
            chosen.append(self._order.popleft())
        more = bool(self._order) or self.group.whole is not None  # another part may come
        return GroupSlice(self.group, tuple(chosen), more=more) if chosen else None


def fill(waiting: Iterable[Waiting], room: int, *, force: bool = False) -> list[GroupSlice]:
    """Take from each in turn what still fits `room` tokens; with `force` at least one document of the first."""
    slices: list[GroupSlice] = []
    for item in waiting:
        group_slice = item.take(room, force=force and not slices)
        if group_slice is None:
            break
        slices.append(group_slice)
        room -= group_slice.tokens
    return slices


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Rows `start` to `stop` of the batch, or where `past` of the keys and values that earlier passes left."""

    start: int
    stop: int
    past: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Segment:
    """A prefix or a document as rows: its own, and those before them that they attend to as well, in the prompt's order."""

    own: RowSpan
    seen: tuple[RowSpan, ...] = ()

    @property
    def n_keys(self) -> int:
        """Rows that the last of its own rows sees."""
        return sum(map(len, self.seen)) + len(self.own)


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch as rows of one matrix: which token lies where, and what each row attends to.

    Attributes:
        ids: int64 `(n_rows,)`, token of each row.
        positions: int64 `(n_rows,)`, place of each row's token in its prompt, for the rotary positions.
        prefixes: Whole groups whose prefix this pass computes, with its segment: what comes behind a shared prefix at
            hand.
        shared_prefixes: Those whose keys and values are at hand; their rows come first among the past ones.
        past_groups: Whole groups whose prefix is at hand, in the order of their past rows.
        documents: One segment a document, in the batch's order.
    """

    ids: np.ndarray
    positions: np.ndarray
    prefixes: tuple[tuple[QueryGroup, Segment], ...]
    shared_prefixes: tuple[SharedPrefix, ...]
    past_groups: tuple[QueryGroup, ...]
    documents: tuple[Segment, ...]

    @property
    def segments(self) -> list[Segment]:
        """All segments of this pass."""
        return [segment for _, segment in self.prefixes] + list(self.documents)

    @property
    def n_past(self) -> int:
        """Rows that earlier passes left."""
        return sum(map(len, self.shared_prefixes)) + sum(len(group.prefix) for group in self.past_groups)

    @property
    def last_rows(self) -> np.ndarray:
        """int64 `(n_documents,)`, the row of each document's last token."""
        return np.array([segment.own.stop - 1 for segment in self.documents], dtype=np.int64)


def lay_out(
    batch: PackedBatch, *, past_groups: Container[QueryGroup] = (), shared_prefixes: Sequence[SharedPrefix] = ()
) -> Layout:
    """Return the rows of a batch.

    Args:
        batch: What is to be computed.
        past_groups: Whole groups whose prefix has keys and values from an earlier pass: no rows are made for it.
        shared_prefixes: Those with keys and values from an earlier pass, in the order in which they will be joined.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    prefixes: list[tuple[QueryGroup, Segment]] = []
    at_hand: list[QueryGroup] = []
    documents: list[Segment] = []
    seen_of: dict[QueryGroup, tuple[RowSpan, ...]] = {}
    shared_spans, past_row = _spans(shared_prefixes)
    row = 0
    for group_slice in batch.slices:
        # 1. the prefix: at hand, laid out by another part of the same group, or computed here behind what is shared
        group, root, n_prefix = group_slice.group, group_slice.group.root, len(group_slice.group.prefix)
        if root in seen_of:
            seen = seen_of[root]
        elif root in past_groups:
            seen = (RowSpan(past_row, past_row := past_row + n_prefix, past=True),)
            at_hand.append(root)
        else:
            shared_prefix = (shared_spans[group.shared_prefix],) if group.shared_prefix in shared_spans else ()
            n_shared = sum(map(len, shared_prefix))
            segment = Segment(RowSpan(row, row := row + n_prefix - n_shared), shared_prefix)
            seen = (*shared_prefix, segment.own)
            prefixes.append((root, segment))
            ids.append(group.prefix[n_shared:])
            positions.append(np.arange(n_shared, n_prefix))
        seen_of[root] = seen
        # 2. the documents, each behind the prefix and blind to the others
        for index in group_slice.indices:
            document = group.documents[index]
            documents.append(Segment(RowSpan(row, row := row + len(document)), seen))
            ids.append(document)
            positions.append(np.arange(n_prefix, n_prefix + len(document)))
    return Layout(
        np.concatenate(ids).astype(np.int64),
        np.concatenate(positions).astype(np.int64),
        tuple((group, segment) for group, segment in prefixes if len(segment.own)),
        tuple(shared_prefixes),
        tuple(at_hand),
        tuple(documents),
    )


def _spans(shared_prefixes: Sequence[SharedPrefix]) -> tuple[dict[SharedPrefix | None, RowSpan], int]:
    """Return where each shared prefix's rows lie among the past ones, and how many they are."""
    ends = list(accumulate(map(len, shared_prefixes), initial=0))
    spans = [RowSpan(start, stop, past=True) for start, stop in pairwise(ends)]
    return dict(zip(shared_prefixes, spans, strict=True)), ends[-1]
