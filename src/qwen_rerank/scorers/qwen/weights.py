"""The weights in the shape that the forward pass reads them: fused, in one dtype, on one device, held once."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.matrix import Matrix, as_matrix


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
) -> Weights:
    """Return fused weights; what has been copied is taken out of `stored`, so that nothing is held twice."""

    def take(*names: str) -> torch.Tensor:
        parts = [stored.pop(name).to(device=device, dtype=dtype, copy=True) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    embedding = stored.pop("model.embed_tokens.weight")
    # Copied also where the dtype fits: a memory-mapped file may change or vanish under us.
    embedding = embedding.clone() if device.type == "cpu" else embedding.to(device=device, dtype=dtype, copy=True)
    layers = []
    for i in range(config.n_layers):
        at, last = f"model.layers.{i}.", i == config.n_layers - 1
        layers.append(
            Layer(
                input_norm=take(at + "input_layernorm.weight"),
                qkv=as_matrix(take(*(f"{at}self_attn.{name}_proj.weight" for name in ("kv" if last else "qkv")))),
                query=as_matrix(take(at + "self_attn.q_proj.weight")) if last else None,
                query_norm=take(at + "self_attn.q_norm.weight"),
                key_norm=take(at + "self_attn.k_norm.weight"),
                output=as_matrix(take(at + "self_attn.o_proj.weight")),
                mlp_norm=take(at + "post_attention_layernorm.weight"),
                gate_up=as_matrix(take(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight")),
                down=as_matrix(take(at + "mlp.down_proj.weight")),
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
