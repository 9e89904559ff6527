"""Block-wise causal attention on the CPU: segment by segment, each over its prefix and itself."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_rerank.scorers.qwen.layout import Layout, Part

Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (n_rows, n_kv_heads, head_dim)

_BLOCK = 512  # query rows of one call: bounds the mask, and skips most keys that causality hides


class CpuAttention:
    """Attention over packed rows.

    A loop of dense calls needs no mask over the whole pack, which would grow with the square of its rows.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._mask = torch.zeros(0, 0, dtype=dtype)

    def prepare(self, layout: Layout) -> Layout:
        """Return what `all_rows` and `last_rows` need to know of a pack; here the layout itself."""
        return layout

    def all_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, layout: Layout) -> torch.Tensor:
        """Attend from every row.

        Args:
            query: `(n_rows, n_heads, head_dim)`.
            keys: Keys and values of the pack's rows.
            kept: Keys and values of the kept prefixes.
            layout: As `prepare` gave it.

        Returns:
            `(n_rows, n_heads, head_dim)`.
        """
        out = torch.empty_like(query)
        for part in layout.parts:
            key, value = _gather(part, keys, kept)
            n_prefix, own = len(part.prefix), part.own
            for start in range(0, len(own), _BLOCK):
                stop = min(start + _BLOCK, len(own))
                rows = slice(own.start + start, own.start + stop)
                out[rows] = self._block(query[rows], key[: n_prefix + stop], value[: n_prefix + stop])
        return out

    def last_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, layout: Layout) -> torch.Tensor:
        """Attend from each document's last row; `query` and the result are `(n_documents, n_heads, head_dim)`."""
        out = torch.empty_like(query)
        for i, part in enumerate(layout.documents):
            out[i : i + 1] = self._block(query[i : i + 1], *_gather(part, keys, kept))
        return out

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


def _gather(part: Part, keys: Keys, kept: Keys | None) -> Keys:
    """Return keys and values of a segment's prefix and own rows."""
    own = slice(part.own.start, part.own.stop)
    if not len(part.prefix):
        return keys[0][own], keys[1][own]
    source = kept if part.prefix.kept and kept is not None else keys
    prefix = slice(part.prefix.start, part.prefix.stop)
    return torch.cat((source[0][prefix], keys[0][own])), torch.cat((source[1][prefix], keys[1][own]))
