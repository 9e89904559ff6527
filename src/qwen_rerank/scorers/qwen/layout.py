"""A pack as rows of one matrix: which token lies where, and which rows each row may look at."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from qwen_rerank.packing import Pack, Tree


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `stop`; rows of the kept prefixes where `kept`, else of the pack."""

    start: int
    stop: int
    kept: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


NO_ROWS = Span(0, 0)


@dataclass(frozen=True, slots=True)
class Part:
    """A segment: its own rows, and the prefix rows that they see besides themselves."""

    own: Span
    prefix: Span


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies.

    Attributes:
        ids: int64 `(n_rows,)`, token of each row.
        positions: int64 `(n_rows,)`, place of each row's token in its prompt.
        prefixes: Trees whose prefix is computed by this pass, with its rows.
        kept: Trees whose prefix is at hand, in the order of its rows.
        documents: One part a document, in the pack's order.
    """

    ids: np.ndarray
    positions: np.ndarray
    prefixes: tuple[tuple[Tree, Span], ...]
    kept: tuple[Tree, ...]
    documents: tuple[Part, ...]

    @property
    def parts(self) -> list[Part]:
        """All segments of this pass."""
        return [Part(span, NO_ROWS) for _, span in self.prefixes] + list(self.documents)

    @property
    def last_rows(self) -> np.ndarray:
        """int64 `(n_documents,)`, the row of each document's last token."""
        return np.array([part.own.stop - 1 for part in self.documents], dtype=np.int64)


def lay_out(pack: Pack, *, kept: Container[Tree] = ()) -> Layout:
    """Return the rows of a pack; the prefixes of the trees in `kept` are not computed again."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    prefixes: list[tuple[Tree, Span]] = []
    at_hand: list[Tree] = []
    documents: list[Part] = []
    row = kept_row = 0
    for branch in pack.branches:
        tree, n_prefix = branch.tree, len(branch.tree.prefix)
        if tree in kept:
            prefix = Span(kept_row, kept_row := kept_row + n_prefix, kept=True)
            at_hand.append(tree)
        else:
            prefix = Span(row, row := row + n_prefix)
            prefixes.append((tree, prefix))
            ids.append(tree.prefix)
            positions.append(np.arange(n_prefix))
        for index in branch.indices:
            document = tree.documents[index]
            documents.append(Part(Span(row, row := row + len(document)), prefix))
            ids.append(document)
            positions.append(np.arange(n_prefix, n_prefix + len(document)))
    return Layout(
        np.concatenate(ids).astype(np.int64),
        np.concatenate(positions).astype(np.int64),
        tuple((tree, span) for tree, span in prefixes if len(span)),
        tuple(at_hand),
        tuple(documents),
    )
