"""Block-wise causal attention on the CPU: segment by segment, each over its prefix and itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_rerank.scorers.qwen.kernels import KV, EagerOps
from qwen_rerank.scorers.qwen.packing import Layout, Segment

CpuPlan = tuple[Sequence[Segment], Sequence[Segment]]  # segments in the order of their rows; documents

# Query rows of one pair of products. Fewer skip more keys that causality hides, and multiply slower; for every number of
# keys oneDNN also makes and keeps a kernel, half a gigabyte of them for one document of 8,000 tokens in blocks of 64.
_BLOCK, _FLOAT32_BLOCK = 128, 64
_LONG = 2048  # keys of a segment above which blocks are twice as large
_STRIDED_KEYS = 512  # float32 keys of a segment that are not worth a copy in the order of the products
_WEIGHT_BYTES = (
    4 << 20
)  # attention weights of one pair of products, for each thread: a head for each, and near the cores
_KERNEL_KEYS = 1024  # float32 keys above which PyTorch's fused kernel is faster for rows that see little before them


class CpuAttention:
    """Attention over packed rows.

    A loop of dense calls needs no mask over the whole batch, which would grow with the square of its rows. Two plain matrix
    products and a softmax over a block of rows and a few heads beat PyTorch's fused kernel, but for long documents in
    float32: the products run at the speed of the model's own, and what lies between them stays in the caches.
    """

    def __init__(self, dtype: torch.dtype, ops: EagerOps) -> None:
        self._ops = ops
        self._block_rows = _FLOAT32_BLOCK if dtype == torch.float32 else _BLOCK
        self._mask = torch.full((2 * self._block_rows,) * 2, float("-inf"), dtype=dtype).triu_(1)

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
            key, value = (part[None] for part in _gather(segment, kv, past_kv))
            one = scaled_dot_product_attention(query[i, :, None][None], key, value, enable_gqa=True)
            attn_out[i] = one[0, :, 0]
        return attn_out

    def _segment(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, out: torch.Tensor) -> None:
        """Attend from all rows of a segment, causally.

        Args:
            query: `(n_rows, n_heads, head_dim)`.
            key: `(n_kv_heads, n_keys, head_dim)`, the segment's own rows last.
            value: As `key`.
            out: As `query`.
        """
        (n_kv_heads, n_keys, size), (n_rows, n_heads, _) = key.shape, query.shape
        n_prefix, per_kv_head = n_keys - n_rows, n_heads // n_kv_heads
        if key.dtype == torch.float32 and n_keys > _KERNEL_KEYS and n_prefix <= n_rows // 4:
            out.copy_(_fused(query, key, value))
            return
        query, out = (rows.view(n_rows, n_kv_heads, per_kv_head, size).permute(1, 2, 0, 3) for rows in (query, out))
        # Chosen by the shape and the threads, of which deterministic mode has one: there a segment has the same bits in
        # every batch.
        block = self._block_rows * (2 if n_keys > _LONG else 1)
        step = max(1, _WEIGHT_BYTES * torch.get_num_threads() // (block * per_kv_head * n_keys * key.element_size()))
        for first in range(0, n_kv_heads, step):
            heads = slice(first, first + step)
            for start in range(0, n_rows, block):
                rows, n_seen = slice(start, start + block), n_prefix + min(start + block, n_rows)
                out[heads, :, rows] = self._block(query[heads, :, rows], key[heads, :n_seen], value[heads, :n_seen])

    def _block(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from the last rows of what is seen.

        Args:
            query: `(n_kv_heads, per_kv_head, n_rows, head_dim)`.
            key: `(n_kv_heads, n_keys, head_dim)`.
            value: As `key`.

        Returns:
            As `query`.
        """
        (n_kv_heads, per_kv_head, n_rows, size), n_keys = query.shape, key.shape[1]
        # 1. all query heads of a key head side by side, so that one product per key head serves them
        flat = query.reshape(n_kv_heads, per_kv_head * n_rows, size)
        weights = flat.new_empty(n_kv_heads, per_kv_head * n_rows, n_keys)
        torch.baddbmm(weights, flat, key.transpose(1, 2), beta=0, alpha=size**-0.5, out=weights)
        # 2. the mask, only over the rows' own keys: every row sees all keys before them
        self._ops.causal_softmax(weights, self._mask[:n_rows, :n_rows])
        return torch.bmm(weights, value).view(query.shape)


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend with the kernel's own causality, which needs no mask but as many queries as keys.

    The rows of zeros that stand for the prefix cost little beside a long document. Shapes as in `CpuAttention._segment`.
    """
    n_prefix = key.shape[1] - len(query)
    filled = torch.cat((query.new_zeros(n_prefix, *query.shape[1:]), query)).transpose(0, 1)
    attn_out = scaled_dot_product_attention(filled[None], key[None], value[None], is_causal=True, enable_gqa=True)
    return attn_out[0].transpose(0, 1)[n_prefix:]


def _gather(segment: Segment, kv: KV, past_kv: KV | None) -> KV:
    """Return keys and values of what a segment sees, `(n_kv_heads, n_keys, head_dim)`, its own rows last."""
    keys, values = [], []
    for span in (*segment.seen, segment.own):
        key, value = past_kv if span.past and past_kv is not None else kv
        if len(span):
            keys.append(key[span.start : span.stop])
            values.append(value[span.start : span.stop])
    key, value = _joined(keys, segment.n_keys), _joined(values, segment.n_keys)
    return key, value


def _joined(pieces: list[torch.Tensor], n_keys: int) -> torch.Tensor:
    """Return all rows of the pieces, each `(n, n_kv_heads, head_dim)`, as `(n_kv_heads, n_keys, head_dim)`."""
    if pieces[0].dtype == torch.float32 and n_keys <= _STRIDED_KEYS:
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).transpose(0, 1)
    # Copied head by head: oneDNN's products in bfloat16 would make such copies for every block, and many keys in
    # float32 are read faster.
    return torch.cat([piece.transpose(0, 1) for piece in pieces], dim=1)
