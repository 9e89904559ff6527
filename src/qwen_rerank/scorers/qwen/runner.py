"""Runs packs on the device: keeps the prefixes that later packs need, and maps the device's errors."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Iterable
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch

from qwen_rerank.packing import Branch, Opening, Pack, Tree
from qwen_rerank.scorers.qwen.device import as_our_error, on_device
from qwen_rerank.scorers.qwen.forward import Forward, Keys
from qwen_rerank.scorers.qwen.layout import Layout, Part, Span, lay_out

_KEPT_TOKENS = 1024  # of prefixes whose keys and values outlive a pack


class Runner:
    """Computes the scores of a pack.

    Args:
        forward: The forward pass.
        deterministic: Compute every opening, every prefix and every document in a pass of its own. Its shapes then
            depend on nothing but its own tokens, and so do the bits of its score.
        opening_tokens: Tokens of the openings whose keys and values stay for later queries; no longer one is kept.
    """

    def __init__(self, forward: Forward, *, deterministic: bool, opening_tokens: int = 0) -> None:
        self._forward = forward
        self._deterministic = deterministic
        self._opening_tokens = opening_tokens
        self._openings: OrderedDict[Opening, list[Keys]] = OrderedDict()  # the least recently used first
        # A tree's entry goes away with the tree.
        self._kept: WeakKeyDictionary[Tree, list[Keys]] = WeakKeyDictionary()

    def __call__(self, pack: Pack) -> np.ndarray:
        """Return log-odds, float32 `(n_documents,)` in the pack's order.

        Raises:
            DeviceOutOfMemoryError: If the pack is too large for the device.
            DeviceLostError: If the device cannot be used any more.
        """
        try:
            with on_device(self._forward.device):
                return self._one_by_one(pack) if self._deterministic else self._together(pack)
        except Exception as exc:
            # Whoever keeps the error would keep the pass's tensors with it.
            traceback.clear_frames(exc.__traceback__)
            ours = as_our_error(exc)
            if ours is exc:
                raise
            self._release()
            raise ours from exc

    def _together(self, pack: Pack) -> np.ndarray:
        begins = dict.fromkeys(branch.tree.opening for branch in pack.branches if branch.tree.root not in self._kept)
        openings = [opening for opening in begins if opening is not None and opening in self._openings]
        layout = lay_out(pack, kept=self._kept, openings=openings)
        past = [*map(self._opening, openings), *(self._kept[tree] for tree in layout.kept)]
        whole, fresh = self._worth_keeping(pack, layout), self._new_openings(layout)
        spans = [part.own for _, part in whole] + list(fresh.values())
        scores, saved = self._forward(layout, _joined(past) or None, keep=_rows(spans) if spans else None)
        ends = list(accumulate(map(len, spans), initial=0))
        rows = [[(key[slice(*at)], value[slice(*at)]) for key, value in saved] for at in pairwise(ends)]
        for (tree, _), keys in zip(whole, rows, strict=False):
            self._kept[tree] = self._whole(tree, keys)
        for opening, keys in zip(fresh, rows[len(whole) :], strict=True):
            self._remember(opening, keys)
        return scores.cpu().numpy()

    def _one_by_one(self, pack: Pack) -> np.ndarray:
        scores: list[np.ndarray] = []
        for branch in pack.branches:
            tree, root = branch.tree, branch.tree.root
            kept = {root: self._kept.get(root) or self._alone(root)}
            if branch.more and self._has_room(len(tree.prefix)):
                self._kept.update(kept)
            for index in branch.indices:
                layout = lay_out(Pack((Branch(tree, (index,)),)), kept=kept)
                scores.append(self._forward(layout, kept[root])[0].cpu().numpy())
        return np.concatenate(scores)

    def _alone(self, tree: Tree) -> list[Keys]:
        """Compute a prefix in a pass of its own, and its opening before it; for every layer keys and values."""
        opening = tree.opening
        if opening is None or len(opening) > self._opening_tokens:
            return self._pass(tree)
        if opening not in self._openings:
            self._remember(opening, self._pass(Tree(opening.ids, ())))
        return self._whole(tree, self._pass(tree, opening))

    def _pass(self, tree: Tree, *openings: Opening) -> list[Keys]:
        """Compute the prefix of a tree behind the openings, for every layer its keys and values."""
        layout = lay_out(Pack((Branch(tree, ()),)), openings=openings)
        past = _joined([self._opening(opening) for opening in openings]) or None
        return self._forward(layout, past, keep=torch.arange(len(layout.ids)))[1]

    def _opening(self, opening: Opening) -> list[Keys]:
        """Return keys and values of an opening at hand, now the last one used."""
        self._openings.move_to_end(opening)
        return self._openings[opening]

    def _remember(self, opening: Opening, keys: list[Keys]) -> None:
        """Keep an opening for later queries, and let go of those not used for longest."""
        while self._openings and sum(map(len, self._openings)) + len(opening) > self._opening_tokens:
            self._openings.popitem(last=False)
        # A slice would hold all rows that it was cut from.
        self._openings[opening] = [(key.clone(), value.clone()) for key, value in keys]

    def _whole(self, tree: Tree, rows: list[Keys]) -> list[Keys]:
        """Return a whole prefix from its rows, which stand behind the opening where they are fewer than the prefix."""
        if tree.opening is None or len(rows[0][0]) == len(tree.prefix):
            return rows
        return _joined([self._openings[tree.opening], rows])

    def _worth_keeping(self, pack: Pack, layout: Layout) -> list[tuple[Tree, Part]]:
        """Return the prefixes of this pack that a later one needs, with their rows, as far as there is room."""
        unfinished = {branch.tree.root for branch in pack.branches if branch.more}
        wanted: list[tuple[Tree, Part]] = []
        total = 0
        for tree, part in layout.prefixes:
            if tree in unfinished and self._has_room(total + len(tree.prefix)):
                wanted.append((tree, part))
                total += len(tree.prefix)
        return wanted

    def _new_openings(self, layout: Layout) -> dict[Opening, Span]:
        """Return the openings that this pack computes with a prefix, with their rows, as far as they are to be kept."""
        found: dict[Opening, Span] = {}
        for tree, part in layout.prefixes:
            opening = tree.opening
            if opening is not None and not part.seen and len(opening) <= self._opening_tokens:
                found.setdefault(opening, Span(part.own.start, part.own.start + len(opening)))
        return found

    def _has_room(self, tokens: int) -> bool:
        return sum(len(tree.prefix) for tree in self._kept) + tokens <= _KEPT_TOKENS

    def _release(self) -> None:
        """Give back what is not needed, so that a smaller pack finds room."""
        self._kept.clear()
        self._openings.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _rows(spans: Iterable[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])


def _joined(pieces: list[list[Keys]]) -> list[Keys]:
    """Return for each layer the keys and values of all pieces, in order; nothing of no pieces."""
    if len(pieces) == 1:
        return pieces[0]
    return [
        (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
        for layer in zip(*pieces, strict=True)
    ]
