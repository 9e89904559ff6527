"""Runs packs on the device: keeps the prefixes that the next pack needs, and maps the device's errors."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch

from qwen_rerank.packing import Branch, Head, Pack, Tree
from qwen_rerank.scorers.qwen.device import as_our_error, on_device
from qwen_rerank.scorers.qwen.forward import Forward, Keys
from qwen_rerank.scorers.qwen.layout import Layout, Part, lay_out

_KEPT_TOKENS = 1024  # of prefixes whose keys and values outlive a pack


class Runner:
    """Computes the scores of a pack.

    Args:
        forward: The forward pass.
        deterministic: Compute every prefix and every document in a pass of its own. Its shapes then depend on nothing
            but its own tokens, and so do the bits of its score.
        head_tokens: Tokens of the heads whose keys and values stay for later queries; a longer head is not kept apart.
    """

    def __init__(self, forward: Forward, *, deterministic: bool, head_tokens: int = 0) -> None:
        self._forward = forward
        self._deterministic = deterministic
        self._head_tokens = head_tokens
        self._heads: OrderedDict[Head, list[Keys]] = OrderedDict()  # the least recently used first
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
        heads = self._take_heads(branch.tree for branch in pack.branches if branch.tree not in self._kept)
        layout = lay_out(pack, kept=self._kept, heads=heads)
        wanted = self._worth_keeping(pack, layout)
        keep = _rows(part for _, part in wanted) if wanted else None
        past = [*(self._heads[head] for head in heads), *(self._kept[tree] for tree in layout.kept)]
        scores, saved = self._forward(layout, _joined(past) or None, keep=keep)
        first = 0
        for tree, part in wanted:
            rows = slice(first, first := first + len(part.own))
            self._kept[tree] = self._whole(tree, [(key[rows], value[rows]) for key, value in saved])
        return scores.cpu().numpy()

    def _one_by_one(self, pack: Pack) -> np.ndarray:
        scores: list[np.ndarray] = []
        for branch in pack.branches:
            tree = branch.tree
            kept = {tree: self._kept.get(tree) or self._prefix(tree, self._take_heads([tree]))}
            if branch.more and self._has_room(len(tree.prefix)):
                self._kept.update(kept)
            for index in branch.indices:
                layout = lay_out(Pack((Branch(tree, (index,)),)), kept=kept)
                scores.append(self._forward(layout, kept[tree])[0].cpu().numpy())
        return np.concatenate(scores)

    def _prefix(self, tree: Tree, heads: Sequence[Head] = ()) -> list[Keys]:
        """Compute a prefix alone, for every layer its keys and values."""
        layout = lay_out(Pack((Branch(tree, ()),)), heads=heads)
        past = _joined([self._heads[head] for head in heads]) or None
        rows = self._forward(layout, past, keep=torch.arange(len(layout.ids)))[1]
        return self._whole(tree, rows)

    def _take_heads(self, trees: Iterable[Tree]) -> list[Head]:
        """Return the heads of these trees whose keys and values are at hand now, as many as may be kept together."""
        wanted: list[Head] = []
        room = self._head_tokens
        for head in dict.fromkeys(tree.head for tree in trees):
            if head is not None and len(head) <= room:
                room -= len(head)
                wanted.append(head)
        for head in wanted:
            if head not in self._heads:
                self._heads[head] = self._prefix(Tree(head.ids, ()))
            self._heads.move_to_end(head)
        while sum(map(len, self._heads)) > self._head_tokens:
            self._heads.popitem(last=False)
        return wanted

    def _whole(self, tree: Tree, rows: list[Keys]) -> list[Keys]:
        """Return a whole prefix from its rows, which stand behind the head where they are fewer than the prefix."""
        if tree.head is None or len(rows[0][0]) == len(tree.prefix):
            return rows
        return _joined([self._heads[tree.head], rows])

    def _worth_keeping(self, pack: Pack, layout: Layout) -> list[tuple[Tree, Part]]:
        """Return the prefixes of this pack that a later one needs, with their rows, as far as there is room."""
        unfinished = {branch.tree for branch in pack.branches if branch.more}
        wanted: list[tuple[Tree, Part]] = []
        total = 0
        for tree, part in layout.prefixes:
            if tree in unfinished and self._has_room(total + len(tree.prefix)):
                wanted.append((tree, part))
                total += len(tree.prefix)
        return wanted

    def _has_room(self, tokens: int) -> bool:
        return sum(len(tree.prefix) for tree in self._kept) + tokens <= _KEPT_TOKENS

    def _release(self) -> None:
        """Give back what is not needed, so that a smaller pack finds room."""
        self._kept.clear()
        self._heads.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _rows(parts: Iterable[Part]) -> torch.Tensor:
    return torch.cat([torch.arange(part.own.start, part.own.stop) for part in parts])


def _joined(pieces: list[list[Keys]]) -> list[Keys]:
    """Return for each layer the keys and values of all pieces, in order; nothing of no pieces."""
    if len(pieces) == 1:
        return pieces[0]
    return [
        (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
        for layer in zip(*pieces, strict=True)
    ]
