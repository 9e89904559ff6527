"""Runs packs on the device: keeps the prefixes that the next pack needs, and maps the device's errors."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import numpy as np
import torch

from qwen_rerank.packing import Branch, Pack, Tree
from qwen_rerank.scorers.qwen.device import as_our_error, on_device
from qwen_rerank.scorers.qwen.forward import Forward, Keys
from qwen_rerank.scorers.qwen.layout import Layout, Span, lay_out

_KEPT_TOKENS = 1024  # of prefixes whose keys and values outlive a pack


class Runner:
    """Computes the scores of a pack.

    Args:
        forward: The forward pass.
        deterministic: Compute every prefix and every document in a pass of its own. Its shapes then depend on nothing
            but its own tokens, and so do the bits of its score.
    """

    def __init__(self, forward: Forward, *, deterministic: bool) -> None:
        self._forward = forward
        self._deterministic = deterministic
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
        layout = lay_out(pack, kept=self._kept)
        wanted = self._worth_keeping(pack, layout)
        keep = _rows(span for _, span in wanted) if wanted else None
        scores, saved = self._forward(layout, self._past(layout), keep=keep)
        first = 0
        for tree, span in wanted:
            rows = slice(first, first := first + len(span))
            self._kept[tree] = [(key[rows], value[rows]) for key, value in saved]
        return scores.cpu().numpy()

    def _one_by_one(self, pack: Pack) -> np.ndarray:
        scores: list[np.ndarray] = []
        for branch in pack.branches:
            kept = {branch.tree: self._kept.get(branch.tree) or self._prefix(branch.tree)}
            if branch.more and self._has_room(len(branch.tree.prefix)):
                self._kept.update(kept)
            for index in branch.indices:
                layout = lay_out(Pack((Branch(branch.tree, (index,)),)), kept=kept)
                scores.append(self._forward(layout, kept[branch.tree])[0].cpu().numpy())
        return np.concatenate(scores)

    def _prefix(self, tree: Tree) -> list[Keys]:
        """Compute a prefix alone, for every layer its keys and values."""
        layout = lay_out(Pack((Branch(tree, ()),)))
        return self._forward(layout, None, keep=torch.arange(len(tree.prefix)))[1]

    def _past(self, layout: Layout) -> list[Keys] | None:
        """Return for each layer the keys and values of the kept prefixes, in the layout's order."""
        kept = [self._kept[tree] for tree in layout.kept]
        if len(kept) < 2:
            return kept[0] if kept else None
        return [
            (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
            for layer in zip(*kept, strict=True)
        ]

    def _worth_keeping(self, pack: Pack, layout: Layout) -> list[tuple[Tree, Span]]:
        """Return the prefixes of this pack that a later one needs, with their rows, as far as there is room."""
        unfinished = {branch.tree for branch in pack.branches if branch.more}
        wanted: list[tuple[Tree, Span]] = []
        total = 0
        for tree, span in layout.prefixes:
            if tree in unfinished and self._has_room(total + len(span)):
                wanted.append((tree, span))
                total += len(span)
        return wanted

    def _has_room(self, tokens: int) -> bool:
        return sum(len(tree.prefix) for tree in self._kept) + tokens <= _KEPT_TOKENS

    def _release(self) -> None:
        """Give back what is not needed, so that a smaller pack finds room."""
        self._kept.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _rows(spans: Iterable[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])
