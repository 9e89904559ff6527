"""The elementwise work between the matrix products, in PyTorch's own operations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import silu

KV = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (n_rows, n_kv_heads, head_dim)
CosSin = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of each row's position, each (n_rows, head_dim // 2)


class Ops(Protocol):
    """The elementwise operations that a device may have a fused kernel for."""

    def norm_rotate(self, x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, eps: float) -> torch.Tensor:
        """Normalise every head of `x` `(n_rows, heads, head_dim)` and apply the rotary positions."""
        ...

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up` of `(n_rows, 2 * size)`; may overwrite its input."""
        ...


class EagerOps:
    """Works everywhere; one pass over the data an operation."""

    def norm_rotate(self, x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, eps: float) -> torch.Tensor:
        """Normalise every head of `x` and apply the rotary positions."""
        size, half = x.shape[-1], x.shape[-1] // 2
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(size).add_(eps).rsqrt_()
        normed = (x * scale).to(x.dtype).mul_(weight)  # a scale rounded to bfloat16 would shift a whole head
        cosine, sine = cos_sin[0].unsqueeze(1), cos_sin[1].unsqueeze(1)
        first, second = normed.chunk(2, dim=-1)
        out = torch.empty_like(normed)
        torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine, value=-1)
        torch.mul(second, cosine, out=out[..., half:]).addcmul_(first, sine)
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up`."""
        gate, up = gate_up.chunk(2, dim=1)
        return silu(gate).mul_(up)
