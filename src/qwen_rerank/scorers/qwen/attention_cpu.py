"""Block-wise causal attention on the CPU: segment by segment, each over its prefix and itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_rerank.scorers.qwen.kernels import KV
from qwen_rerank.scorers.qwen.packing import Layout, Segment

CpuPlan = tuple[Sequence[Segment], Sequence[Segment]]  # segments in the order of their rows; documents

_SMALL = 1024  # keys of a segment whose attention weights stay in the caches, a block at a time
_SMALL_BLOCK = 64  # query rows of one pair of plain products: fewer skip more hidden keys, and multiply slower
_BLOCK = 512  # query rows of one call of the kernel: bounds the mask, and skips most keys that causality hides


class CpuAttention:
    """Attention over packed rows.

    A loop of dense calls needs no mask over the whole batch, which would grow with the square of its rows.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._mask = torch.zeros(0, 0, dtype=dtype)

    def prepare(self, layout: Layout) -> CpuPlan:
        """Return the segments in the order of their rows, and the documents."""
        return sorted(layout.segments, key=lambda segment: segment.own.start), layout.documents

    def all_rows(self, query: torch.Tensor, kv: KV, past_kv: KV | None, plan: CpuPlan) -> torch.Tensor:
        """Attend from every row.

        Args:
            query: `(n_rows, n_heads, head_dim)`.
            kv: Keys and values of the batch's rows.
            past_kv: Keys and values that earlier passes left.
            plan: As `prepare` gave it.

        Returns:
            `(n_rows, n_heads, head_dim)`.
        """
        attn_out = torch.empty_like(query)
        for segment in plan[0]:
            own = slice(segment.own.start, segment.own.stop)
            self._segment(query[own], *_gather(segment, kv, past_kv), out=attn_out[own])
        return attn_out

    def last_rows(self, query: torch.Tensor, kv: KV, past_kv: KV | None, plan: CpuPlan) -> torch.Tensor:
        """Attend from each document's last row; `query` and the result are `(n_documents, n_heads, head_dim)`."""
        attn_out = torch.empty_like(query)
        for i, segment in enumerate(plan[1]):
            attn_out[i] = self._block(query[i : i + 1], *_gather(segment, kv, past_kv))[0]
        return attn_out

    def _segment(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, out: torch.Tensor) -> None:
        """Attend from all rows of a segment, causally."""
        n_rows, n_keys = len(query), len(key)
        n_prefix = n_keys - n_rows
        # Chosen by the shape alone, so that a segment has the same bits in every batch.
        attend, size = self._block, _BLOCK
        if n_keys <= _SMALL and self._dtype == torch.float32:
            attend, size = self._small, _SMALL_BLOCK
        elif n_rows > _BLOCK and n_prefix <= n_rows // 4:
            attend, size = _square, n_rows
        for start in range(0, n_rows, size):
            rows, n_seen = slice(start, start + size), n_prefix + min(start + size, n_rows)
            out[rows] = attend(query[rows], key[:n_seen], value[:n_seen])

    def _small(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend by two plain matrix products, which beat the blocked kernel while the weights stay in the caches."""
        (n_rows, n_heads, size), (n_keys, n_kv_heads) = query.shape, key.shape[:2]
        per_kv_head, n_open = n_heads // n_kv_heads, n_keys - n_rows
        # 1. all query heads of a key head side by side, so that one product per key head serves them
        scaled = (query * size**-0.5).view(n_rows, n_kv_heads, per_kv_head, size)
        scaled = scaled.permute(1, 2, 0, 3).reshape(n_kv_heads, -1, size)  # (n_kv_heads, per_kv_head * n_rows, size)
        weights = torch.bmm(scaled, key.permute(1, 2, 0))  # (n_kv_heads, per_kv_head * n_rows, n_keys)
        # 2. the mask, only over the segment's own keys: every row sees all keys before them
        weights = weights.view(n_kv_heads, per_kv_head, n_rows, n_keys)
        weights[..., n_open:].add_(self._causal(n_rows, n_rows))
        weights = torch.softmax(weights, dim=-1).view(n_kv_heads, -1, n_keys)
        # 3. back to the rows' own order
        attn_out = torch.bmm(weights, value.transpose(0, 1)).view(n_kv_heads, per_kv_head, n_rows, size)
        return attn_out.permute(2, 0, 1, 3).flatten(1, 2)  # (n_rows, n_heads, size)

    def _block(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from the last rows of a segment, causally; `(n, n_heads, head_dim)`."""
        n_rows, n_keys = len(query), len(key)
        mask = self._causal(n_rows, n_keys) if n_rows > 1 else None
        attn_out = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        return attn_out[0].transpose(0, 1)

    def _causal(self, n_rows: int, n_keys: int) -> torch.Tensor:
        """Return the mask `(n_rows, n_keys)` whose lower right corner is the last row seeing the last key."""
        open_keys = n_keys - n_rows  # seen by every row
        width = self._mask.shape[1] - _BLOCK
        if width < open_keys:
            width = max(open_keys, 2 * width, 2048)
            hidden = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=self._dtype).triu_(1)
            self._mask = torch.cat((torch.zeros(_BLOCK, width, dtype=self._dtype), hidden), dim=1)
        return self._mask[:n_rows, width - open_keys : width + n_rows]


def _square(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend with the kernel's own causality, which needs no mask but as many queries as keys.

    The rows of zeros that stand for the prefix cost little beside a long document.
    """
    n_prefix = len(key) - len(query)
    filled = torch.cat((query.new_zeros(n_prefix, *query.shape[1:]), query))
    attn_out = scaled_dot_product_attention(
        filled.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    return attn_out[0].transpose(0, 1)[n_prefix:]


def _gather(segment: Segment, kv: KV, past_kv: KV | None) -> KV:
    """Return keys and values of what a segment sees, its own rows last."""
    pieces = [
        (source[0][span.start : span.stop], source[1][span.start : span.stop])
        for span in (*segment.seen, segment.own)
        for source in [past_kv if span.past and past_kv is not None else kv]
        if len(span)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([key for key, _ in pieces]), torch.cat([value for _, value in pieces])
