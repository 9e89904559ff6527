"""A pack as rows of one matrix: which token lies where, and which rows each row may look at."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from qwen_rerank.packing import Opening, Pack, Tree


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `stop`; rows of what earlier passes left where `kept`, else of the pack."""

    start: int
    stop: int
    kept: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Part:
    """A segment: its own rows, and the rows before them that they see besides themselves, in the prompt's order."""

    own: Span
    seen: tuple[Span, ...] = ()

    @property
    def n_keys(self) -> int:
        """Rows that the last of its own rows sees."""
        return sum(map(len, self.seen)) + len(self.own)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies.

    Attributes:
        ids: int64 `(n_rows,)`, token of each row.
        positions: int64 `(n_rows,)`, place of each row's token in its prompt.
        prefixes: Whole trees whose prefix is computed by this pass, with its part: what comes behind an opening at hand.
        openings: What is at hand of the openings; their rows come first among the kept ones.
        kept: Whole trees whose prefix is at hand, in the order of their rows.
        documents: One part a document, in the pack's order.
    """

    ids: np.ndarray
    positions: np.ndarray
    prefixes: tuple[tuple[Tree, Part], ...]
    openings: tuple[Opening, ...]
    kept: tuple[Tree, ...]
    documents: tuple[Part, ...]

    @property
    def parts(self) -> list[Part]:
        """All segments of this pass."""
        return [part for _, part in self.prefixes] + list(self.documents)

    @property
    def n_kept(self) -> int:
        """Rows that earlier passes left."""
        return sum(map(len, self.openings)) + sum(len(tree.prefix) for tree in self.kept)

    @property
    def last_rows(self) -> np.ndarray:
        """int64 `(n_documents,)`, the row of each document's last token."""
        return np.array([part.own.stop - 1 for part in self.documents], dtype=np.int64)


def lay_out(pack: Pack, *, kept: Container[Tree] = (), openings: Sequence[Opening] = ()) -> Layout:
    """Return the rows of a pack; neither the prefixes of the trees in `kept` nor `openings` are computed again."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    prefixes: list[tuple[Tree, Part]] = []
    at_hand: list[Tree] = []
    documents: list[Part] = []
    seen_of: dict[Tree, tuple[Span, ...]] = {}
    opening_spans, kept_row = _spans(openings)
    row = 0
    for branch in pack.branches:
        tree, root, n_prefix = branch.tree, branch.tree.root, len(branch.tree.prefix)
        if root in seen_of:  # another part of the same tree lies in this pack
            seen = seen_of[root]
        elif root in kept:
            seen = (Span(kept_row, kept_row := kept_row + n_prefix, kept=True),)
            at_hand.append(root)
        else:
            opening = (opening_spans[tree.opening],) if tree.opening in opening_spans else ()
            n_opening = sum(map(len, opening))
            part = Part(Span(row, row := row + n_prefix - n_opening), opening)
            seen = (*opening, part.own)
            prefixes.append((root, part))
            ids.append(tree.prefix[n_opening:])
            positions.append(np.arange(n_opening, n_prefix))
        seen_of[root] = seen
        for index in branch.indices:
            document = tree.documents[index]
            documents.append(Part(Span(row, row := row + len(document)), seen))
            ids.append(document)
            positions.append(np.arange(n_prefix, n_prefix + len(document)))
    return Layout(
        np.concatenate(ids).astype(np.int64),
        np.concatenate(positions).astype(np.int64),
        tuple((tree, part) for tree, part in prefixes if len(part.own)),
        tuple(openings),
        tuple(at_hand),
        tuple(documents),
    )


def _spans(openings: Sequence[Opening]) -> tuple[dict[Opening | None, Span], int]:
    """Return where each opening's rows lie among the kept ones, and how many they are."""
    ends = list(accumulate(map(len, openings), initial=0))
    spans = [Span(start, stop, kept=True) for start, stop in pairwise(ends)]
    return dict(zip(openings, spans, strict=True)), ends[-1]
