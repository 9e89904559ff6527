"""The model: matrices in the shape that the forward pass reads, and the pass over packed rows.

No padding; a prefix is computed once for all documents behind it; the last layer only where it is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.kernels import KV, CosSin, Ops
from qwen_rerank.scorers.qwen.packing import Layout

_PACKED_FOR_ROWS = 512  # near the row chunk; the packing serves other counts as well


class Matrix(Protocol):
    """A matrix `(out, in)` that rows are multiplied by."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        ...

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows `(n, in)` to `total` `(n, out)`, in place."""
        ...


class PlainMatrix:
    """Works everywhere.

    Args:
        weight: `(out, in)`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        return linear(rows, self._weight)

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows to `total`, in place."""
        total.addmm_(rows, self._weight.t())


class PackedMatrix:
    """A copy in oneDNN's own layout: up to twice as fast as the plain one on CPUs where that goes to MKL.

    Args:
        weight: `(out, in)`; not kept.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, None, "none", [], "")
        return product

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows to `total`, in place."""
        total.add_(self(rows))


def as_matrix(weight: torch.Tensor) -> Matrix:
    """Return a matrix in the fastest form for its device and dtype; the choice depends on nothing else."""
    packed = weight.device.type == "cpu" and _packs(weight.dtype)
    return PackedMatrix(weight) if packed else PlainMatrix(weight)


def exact_matrix(_: str, weight: torch.Tensor) -> Matrix:
    """Return a matrix of its weight's own dtype, whatever its name."""
    return as_matrix(weight)


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this build and CPU have the kernels, and they are right."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = torch.linspace(-1.0, 1.0, 64 * 32).view(64, 32).to(dtype)
    rows = torch.linspace(-1.0, 1.0, 3 * 32).view(3, 32).to(dtype)
    try:
        found = PackedMatrix(weight)(rows)
    except (AttributeError, RuntimeError, NotImplementedError):  # private operators: another version may lack them
        return False
    return torch.allclose(found.float(), linear(rows.float(), weight.float()), rtol=0.02, atol=0.02)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; every matrix is `(out, in)`.

    Attributes:
        qkv: Of query, key and value in one; in the last layer, whose queries are few, of key and value alone.
        query: Of the query, in the last layer only.
    """

    input_norm: torch.Tensor
    qkv: Matrix
    query: Matrix | None
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    output: Matrix
    mlp_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class Weights:
    """All that a score needs.

    Attributes:
        embedding: `(vocab_size, hidden_size)`, in the stored dtype on the CPU, where rows are converted when read.
        layers: The decoder layers.
        norm: The last norm, `(hidden_size,)`.
        head: float32 `(hidden_size,)`, the row of "yes" minus the row of "no".
        cosine: `(max_length, head_dim // 2)`, of the rotary positions.
        sine: As `cosine`.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


def fuse(
    stored: MutableMapping[str, torch.Tensor],
    head: torch.Tensor,
    config: QwenModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    make_matrix: Callable[[str, torch.Tensor], Matrix],
) -> Weights:
    """Return fused weights; what has been copied is taken out of `stored`, so that nothing is held twice.

    Args:
        stored: Hugging Face name to tensor.
        head: As `Weights.head`.
        config: The model's shape.
        dtype: Of everything but the embedding on the CPU, and the head.
        device: Where the weights go.
        max_length: Positions of the rotary table.
        make_matrix: Makes a matrix of a name such as "layers.0.qkv" and its weight.
    """

    def take(*names: str) -> torch.Tensor:
        parts = [stored.pop(name).to(device=device, dtype=dtype, copy=True) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def matrix(layer: int, name: str, *parts: str) -> Matrix:
        return make_matrix(f"layers.{layer}.{name}", take(*(f"model.layers.{layer}.{part}.weight" for part in parts)))

    embedding = stored.pop("model.embed_tokens.weight")
    # Copied also where the dtype fits: a memory-mapped file may change or vanish under us.
    embedding = embedding.clone() if device.type == "cpu" else embedding.to(device=device, dtype=dtype, copy=True)
    layers = []
    for i in range(config.n_layers):
        at, last = f"model.layers.{i}.", i == config.n_layers - 1
        layers.append(
            Layer(
                input_norm=take(at + "input_layernorm.weight"),
                qkv=matrix(i, "qkv", *(f"self_attn.{name}_proj" for name in ("kv" if last else "qkv"))),
                query=matrix(i, "query", "self_attn.q_proj") if last else None,
                query_norm=take(at + "self_attn.q_norm.weight"),
                key_norm=take(at + "self_attn.k_norm.weight"),
                output=matrix(i, "output", "self_attn.o_proj"),
                mlp_norm=take(at + "post_attention_layernorm.weight"),
                gate_up=matrix(i, "gate_up", "mlp.gate_proj", "mlp.up_proj"),
                down=matrix(i, "down", "mlp.down_proj"),
            )
        )
    cosine, sine = rotary_table(config, max_length)
    return Weights(
        embedding=embedding,
        layers=tuple(layers),
        norm=take("model.norm.weight"),
        head=head.to(device=device, dtype=torch.float32, copy=True),
        cosine=cosine.to(device=device, dtype=dtype),
        sine=sine.to(device=device, dtype=dtype),
    )


def rotary_table(config: QwenModelConfig, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of the rotary positions, float32 `(max_length, head_dim // 2)`; both halves are equal."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32) / config.head_dim
    angles = torch.arange(max_length, dtype=torch.float32)[:, None] * (1.0 / config.rope_theta**exponents)[None]
    return angles.cos(), angles.sin()


class Attention(Protocol):
    """Block-wise causal attention over packed rows."""

    def prepare(self, layout: Layout) -> Any:
        """Return what the other methods need to know of a batch, made once for all layers."""
        ...

    def all_rows(self, query: torch.Tensor, kv: KV, past_kv: KV | None, plan: Any) -> torch.Tensor:
        """Attend from every row: `(n_rows, n_heads, head_dim)`."""
        ...

    def last_rows(self, query: torch.Tensor, kv: KV, past_kv: KV | None, plan: Any) -> torch.Tensor:
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
        self, layout: Layout, past_kv: list[KV] | None, *, keep_rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[KV]]:
        """Compute one batch.

        Args:
            layout: The batch's rows.
            past_kv: For each layer the keys and values that earlier passes left, `(n_past, n_kv_heads, head_dim)` each.
            keep_rows: int64 `(n_kept,)`, rows whose keys and values come back, for the batches that follow.

        Returns:
            Log-odds, float32 `(n_documents,)` in the batch's order, and for each layer the keys and values of
            `keep_rows`.
        """
        # 1. ids and positions to the device, and the rotary positions' cosines and sines, once for all layers
        weights, plan = self._weights, self._attention.prepare(layout)
        rows = torch.from_numpy(layout.ids).to(self.device, non_blocking=True)
        positions = torch.from_numpy(layout.positions).to(self.device, non_blocking=True)
        last = torch.from_numpy(layout.last_rows).to(self.device, non_blocking=True)
        cos_sin = (weights.cosine[positions], weights.sine[positions])  # each (n_rows, head_dim // 2)
        # 2. embed; the CPU's table is in the stored dtype, so rows are converted as they are read
        hidden = weights.embedding[rows].to(self._dtype)  # (n_rows, hidden_size)
        new_kv: list[KV] = []
        for i, layer in enumerate(weights.layers):
            # 3. project and attend; in the last layer only each document's last row is read from here on
            final = i == len(weights.layers) - 1
            past = past_kv[i] if past_kv is not None else None
            query, key, value = self._project(layer, hidden, cos_sin, last if final else None)
            if keep_rows is not None:
                new_kv.append((key[keep_rows], value[keep_rows]))
            if final:
                hidden = hidden[last]  # (n_documents, hidden_size)
                attn_out = self._attention.last_rows(
                    query, (key, value), past, plan
                )  # (n_documents, n_heads, head_dim)
            else:
                attn_out = self._attention.all_rows(query, (key, value), past, plan)  # (n_rows, n_heads, head_dim)
            # 4. output projection and MLP, added to the residual stream in place
            self._add_block(layer, hidden, attn_out.flatten(1))
        # 5. the head: one product with w_yes - w_no in float32, because bfloat16 would turn close scores into ties
        hidden = self._norm(hidden, weights.norm)
        return hidden.float() @ weights.head, new_kv  # (n_documents,)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._ops.norm(x, weight, self._config.rms_norm_eps)

    def _project(
        self, layer: Layer, hidden: torch.Tensor, cos_sin: CosSin, last: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value of every row, `(n, heads, head_dim)`; with `last` the queries of those rows only."""
        shapes = ((len(hidden), n, self._config.head_dim) for n in self._head_counts(layer))
        query, key, value = (hidden.new_empty(shape) for shape in shapes)
        for rows in self._chunks(len(hidden)):
            cos_sin_here = cos_sin[0][rows], cos_sin[1][rows]
            self._heads(layer, hidden[rows], cos_sin_here, out=(query[rows], key[rows], value[rows]))
        if layer.query is not None and last is not None:
            flat = layer.query(self._norm(hidden[last], layer.input_norm))  # (n_documents, n_heads * head_dim)
            query = flat.view(len(last), self._config.n_heads, self._config.head_dim)
            query = self._rotate(query, layer.query_norm, (cos_sin[0][last], cos_sin[1][last]))
        return query, key, value

    def _heads(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        cos_sin: CosSin,
        *,
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        """Leave query, key and value of some rows in `out`; no query in the last layer."""
        flat, counts = layer.qkv(self._norm(hidden, layer.input_norm)), self._head_counts(layer)
        query, key, value = torch.split(flat.view(len(hidden), sum(counts), self._config.head_dim), counts, dim=1)
        if query.shape[1]:
            self._rotate(query, layer.query_norm, cos_sin, out=out[0])
        self._rotate(key, layer.key_norm, cos_sin, out=out[1])
        out[2].copy_(value)

    def _head_counts(self, layer: Layer) -> list[int]:
        """Return how many heads of query, key and value the layer's joined matrix gives."""
        shape = self._config
        return [shape.n_heads if layer.query is None else 0, shape.n_kv_heads, shape.n_kv_heads]

    def _rotate(
        self, x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._ops.norm_rotate(x, weight, cos_sin, self._config.rms_norm_eps, out=out)

    def _add_block(self, layer: Layer, hidden: torch.Tensor, attn_out: torch.Tensor) -> None:
        """Add the attention's output and the MLP to `hidden`, in place, some rows at a time."""
        for rows in self._chunks(len(hidden)):
            chunk = hidden[rows]  # a view: what is added to it is added to `hidden`
            layer.output.add_to(chunk, attn_out[rows])
            layer.down.add_to(chunk, self._ops.gate(layer.gate_up(self._norm(chunk, layer.mlp_norm))))

    def _chunks(self, n_rows: int) -> list[slice]:
        return [slice(start, start + self._row_chunk) for start in range(0, n_rows, self._row_chunk)]
