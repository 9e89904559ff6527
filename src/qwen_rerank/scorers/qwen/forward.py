"""The forward pass over packed rows: no padding, prefixes once, the last layer only where it is read."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import rms_norm

from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.layout import Layout
from qwen_rerank.scorers.qwen.ops import Ops
from qwen_rerank.scorers.qwen.weights import Layer, Weights

Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (n_rows, n_kv_heads, head_dim)


class Attention(Protocol):
    """Block-wise causal attention over packed rows."""

    def prepare(self, layout: Layout) -> Any:
        """Return what the other methods need to know of a pack, made once for all layers."""
        ...

    def all_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, plan: Any) -> torch.Tensor:
        """Attend from every row: `(n_rows, n_heads, head_dim)`."""
        ...

    def last_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, plan: Any) -> torch.Tensor:
        """Attend from each document's last row: `(n_documents, n_heads, head_dim)`."""
        ...


class Forward:
    """Scores packed rows.

    Args:
        weights: Fused weights.
        config: The model's shape.
        attention: For the device that the weights are on.
        ops: The elementwise work on that device.
        row_chunk: Rows that go through an MLP at a time; bounds memory, and keeps the CPU's caches warm.
    """

    def __init__(
        self, weights: Weights, config: QwenModelConfig, attention: Attention, ops: Ops, *, row_chunk: int
    ) -> None:
        self._weights = weights
        self._config = config
        self._attention = attention
        self._ops = ops
        self._row_chunk = row_chunk
        self._dtype = weights.norm.dtype
        self.device = weights.norm.device

    @torch.inference_mode()
    def __call__(
        self, layout: Layout, kept: list[Keys] | None, *, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[Keys]]:
        """Compute one pack.

        Args:
            layout: The pack's rows.
            kept: For each layer the keys and values of the kept prefixes.
            keep: Rows whose keys and values come back, for the packs that follow.

        Returns:
            Log-odds, float32 `(n_documents,)` in the pack's order, and for each layer the keys and values of `keep`.
        """
        weights, plan = self._weights, self._attention.prepare(layout)
        rows = torch.from_numpy(layout.ids).to(self.device, non_blocking=True)
        positions = torch.from_numpy(layout.positions).to(self.device, non_blocking=True)
        last = torch.from_numpy(layout.last_rows).to(self.device, non_blocking=True)
        turn = (weights.cosine[positions], weights.sine[positions])
        hidden = weights.embedding[rows].to(self._dtype)  # (n_rows, hidden_size)
        saved: list[Keys] = []
        for i, layer in enumerate(weights.layers):
            final = i == len(weights.layers) - 1
            past = kept[i] if kept is not None else None
            query, key, value = self._project(layer, hidden, turn, last if final else None)
            if keep is not None:
                saved.append((key[keep], value[keep]))
            if final:
                hidden = hidden[last]
                mixed = self._attention.last_rows(query, (key, value), past, plan)
            else:
                mixed = self._attention.all_rows(query, (key, value), past, plan)
            self._advance(layer, hidden, mixed.flatten(1))
        hidden = self._norm(hidden, weights.norm)
        return hidden.float() @ weights.head + weights.head_bias, saved

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), weight, self._config.rms_norm_eps)

    def _project(
        self, layer: Layer, hidden: torch.Tensor, turn: Keys, last: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value of every row, `(n, heads, head_dim)`; with `last` the queries of those rows only."""
        shape, n_query = self._config, self._config.n_heads * self._config.head_dim
        normed = self._norm(hidden, layer.input_norm)
        if layer.kv is None:
            qkv = layer.qkv(normed)
            flat_query, flat_keys = qkv[:, :n_query], qkv[:, n_query:]
        else:
            flat_query, flat_keys = layer.qkv(normed if last is None else normed[last]), layer.kv(normed)
        query_turn = turn if last is None else (turn[0][last], turn[1][last])
        query = flat_query.view(len(flat_query), shape.n_heads, shape.head_dim)
        key, value = flat_keys.view(len(hidden), 2 * shape.n_kv_heads, shape.head_dim).chunk(2, dim=1)
        rotate, eps = self._ops.norm_rotate, shape.rms_norm_eps
        return rotate(query, layer.query_norm, query_turn, eps), rotate(key, layer.key_norm, turn, eps), value

    def _advance(self, layer: Layer, hidden: torch.Tensor, mixed: torch.Tensor) -> None:
        """Add the attention's output and the MLP to `hidden`, in place, some rows at a time."""
        for start in range(0, len(hidden), self._row_chunk):
            rows = slice(start, start + self._row_chunk)
            chunk = hidden[rows]
            layer.output.add_to(chunk, mixed[rows])
            layer.down.add_to(chunk, self._ops.gate(layer.gate_up(self._norm(chunk, layer.mlp_norm))))
