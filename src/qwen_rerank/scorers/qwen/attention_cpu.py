"""Block-wise causal attention on the CPU: segment by segment, each over its prefix and itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_rerank.scorers.qwen.layout import Layout, Part

Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (n_rows, n_kv_heads, head_dim)

_BLOCK = 512  # query rows of one call: bounds the mask, and skips most keys that causality hides


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """The segments of a pack.

    Attributes:
        lengths: Rows of each segment, in the order of the rows.
        rows: Rows of kept prefixes and pack, to be gathered as keys of every segment in turn.
        key_lengths: Keys of each segment.
        last_rows: As `rows`, of the documents only.
        last_lengths: As `key_lengths`, of the documents only.
    """

    lengths: list[int]
    rows: torch.Tensor
    key_lengths: list[int]
    last_rows: torch.Tensor
    last_lengths: list[int]


class CpuAttention:
    """Attention over packed rows.

    A loop of dense calls needs no mask over the whole pack, which would grow with the square of its rows.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._mask = torch.zeros(0, 0, dtype=dtype)

    def prepare(self, layout: Layout) -> CpuPlan:
        """Return the keys that every segment sees, as rows to gather once a layer."""
        n_kept = sum(len(tree.prefix) for tree in layout.kept)
        parts = sorted(layout.parts, key=lambda part: part.own.start)  # in the order of the rows
        return CpuPlan(
            [len(part.own) for part in parts], *_gathered(parts, n_kept), *_gathered(layout.documents, n_kept)
        )

    def all_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, plan: CpuPlan) -> torch.Tensor:
        """Attend from every row.

        Args:
            query: `(n_rows, n_heads, head_dim)`.
            keys: Keys and values of the pack's rows.
            kept: Keys and values of the kept prefixes.
            plan: As `prepare` gave it.

        Returns:
            `(n_rows, n_heads, head_dim)`.
        """
        mixed = [query[:0]]
        segments = zip(
            torch.split_with_sizes(query, plan.lengths),
            *_segments(keys, kept, plan.rows, plan.key_lengths),
            strict=True,
        )
        for rows, key, value in segments:
            n_prefix = len(key) - len(rows)
            for start in range(0, len(rows), _BLOCK):
                stop = min(start + _BLOCK, len(rows))
                mixed.append(self._block(rows[start:stop], key[: n_prefix + stop], value[: n_prefix + stop]))
        return torch.cat(mixed)

    def last_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, plan: CpuPlan) -> torch.Tensor:
        """Attend from each document's last row; `query` and the result are `(n_documents, n_heads, head_dim)`."""
        segments = zip(
            torch.split_with_sizes(query, [1] * len(query)),
            *_segments(keys, kept, plan.last_rows, plan.last_lengths),
            strict=True,
        )
        return torch.cat([query[:0], *(self._block(*segment) for segment in segments)])

    def _block(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from the last rows of a segment, causally; `(n, n_heads, head_dim)`."""
        n_rows, n_keys = len(query), len(key)
        mask = self._causal(n_rows, n_keys) if n_rows > 1 else None
        mixed = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        return mixed[0].transpose(0, 1)

    def _causal(self, n_rows: int, n_keys: int) -> torch.Tensor:
        """Return the mask `(n_rows, n_keys)` whose lower right corner is the last row seeing the last key."""
        open_keys = n_keys - n_rows  # seen by every row
        width = self._mask.shape[1] - _BLOCK
        if width < open_keys:
            width = max(open_keys, 2 * width, 2048)
            hidden = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=self._dtype).triu_(1)
            self._mask = torch.cat((torch.zeros(_BLOCK, width, dtype=self._dtype), hidden), dim=1)
        return self._mask[:n_rows, width - open_keys : width + n_rows]


def _gathered(parts: Sequence[Part], n_kept: int) -> tuple[torch.Tensor, list[int]]:
    """Return the rows of kept prefixes and pack that each part sees, one part after the other, and how many."""
    rows = [torch.zeros(0, dtype=torch.int64)]
    for part in parts:
        for span in (part.prefix, part.own):
            offset = 0 if span.kept else n_kept
            rows.append(torch.arange(offset + span.start, offset + span.stop))
    return torch.cat(rows), [len(part.prefix) + len(part.own) for part in parts]


def _segments(
    keys: Keys, kept: Keys | None, rows: torch.Tensor, lengths: list[int]
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Return keys and values, segment by segment; gathered in one go, which costs less than many small copies."""
    key, value = keys if kept is None else (torch.cat((kept[0], keys[0])), torch.cat((kept[1], keys[1])))
    return torch.split_with_sizes(key[rows], lengths), torch.split_with_sizes(value[rows], lengths)
