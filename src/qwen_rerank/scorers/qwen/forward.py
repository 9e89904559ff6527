"""The forward pass over packed rows: no padding, prefixes once, the last layer only where it is read."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import rms_norm

from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.layout import Layout
from qwen_rerank.scorers.qwen.ops import Ops, Turn
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
        row_chunk: Rows that go through the matrices at a time; bounds memory, and keeps the CPU's caches warm.
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
            kept: For each layer the keys and values that earlier passes left.
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
        return hidden.float() @ weights.head, saved

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), weight, self._config.rms_norm_eps)

    def _project(
        self, layer: Layer, hidden: torch.Tensor, turn: Turn, last: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value of every row, `(n, heads, head_dim)`; with `last` the queries of those rows only."""
        chunks = self._chunks(len(hidden))
        if len(chunks) == 1:
            query, key, value = self._heads(layer, hidden, turn)
        else:
            shapes = ((len(hidden), n, self._config.head_dim) for n in self._head_counts(layer))
            query, key, value = (hidden.new_empty(shape) for shape in shapes)
            for rows in chunks:
                found = self._heads(layer, hidden[rows], (turn[0][rows], turn[1][rows]))
                query[rows], key[rows], value[rows] = found
        if layer.query is not None and last is not None:
            flat = layer.query(self._norm(hidden[last], layer.input_norm))
            query = flat.view(len(last), self._config.n_heads, self._config.head_dim)
            query = self._rotate(query, layer.query_norm, (turn[0][last], turn[1][last]))
        return query, key, value

    def _heads(self, layer: Layer, hidden: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value of some rows; no query in the last layer."""
        flat, counts = layer.qkv(self._norm(hidden, layer.input_norm)), self._head_counts(layer)
        query, key, value = torch.split(flat.view(len(hidden), sum(counts), self._config.head_dim), counts, dim=1)
        if query.shape[1]:
            query = self._rotate(query, layer.query_norm, turn)
        return query, self._rotate(key, layer.key_norm, turn), value

    def _head_counts(self, layer: Layer) -> list[int]:
        """Return how many heads of query, key and value the layer's joined matrix gives."""
        shape = self._config
        return [shape.n_heads if layer.query is None else 0, shape.n_kv_heads, shape.n_kv_heads]

    def _rotate(self, x: torch.Tensor, weight: torch.Tensor, turn: Turn) -> torch.Tensor:
        return self._ops.norm_rotate(x, weight, turn, self._config.rms_norm_eps)

    def _advance(self, layer: Layer, hidden: torch.Tensor, mixed: torch.Tensor) -> None:
        """Add the attention's output and the MLP to `hidden`, in place, some rows at a time."""
        for rows in self._chunks(len(hidden)):
            chunk = hidden[rows]
            layer.output.add_to(chunk, mixed[rows])
            layer.down.add_to(chunk, self._ops.gate(layer.gate_up(self._norm(chunk, layer.mlp_norm))))

    def _chunks(self, n_rows: int) -> list[slice]:
        return [slice(start, start + self._row_chunk) for start in range(0, n_rows, self._row_chunk)]
