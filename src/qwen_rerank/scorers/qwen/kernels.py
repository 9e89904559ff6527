"""The elementwise work between the matrix products, in PyTorch's own operations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import rms_norm, silu

KV = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (n_rows, n_kv_heads, head_dim)
CosSin = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of each row's position, each (n_rows, head_dim // 2)


class Ops(Protocol):
    """The elementwise operations that a device may have a fused kernel for."""

    def norm_rotate(
        self, x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, eps: float, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise every head of `x` `(n_rows, heads, head_dim)` and apply the rotary positions.

        The result lies in `out` where it is given, a dense tensor of the same shape and dtype.
        """
        ...

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up` of `(n_rows, 2 * size)`; may overwrite its input."""
        ...


_BLOCK = 1 << 18  # float32 numbers that an operation on a CPU leaves in the cores' own caches for the next one


class EagerOps:
    """Works everywhere; one pass over the data an operation."""

    def norm_rotate(
        self, x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, eps: float, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise every head of `x` and apply the rotary positions."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        weight, cosine, sine = weight.float(), cos_sin[0].float().unsqueeze(1), cos_sin[1].float().unsqueeze(1)
        # Some rows at a time, so that what is read again is still in the caches, in float32, rounded once.
        step = max(1, _BLOCK // x[0].numel()) if len(x) and x.device.type == "cpu" else max(1, len(x))
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            found = _norm_rotate(x[rows].float(), weight, (cosine[rows], sine[rows]), eps)
            out[rows] = found
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up`."""
        gate, up = gate_up.chunk(2, dim=1)
        return silu(gate).mul_(up)


def norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMS norm of rows `(n_rows, size)` in their dtype, computed in float32 and rounded once.

    On a CPU in bfloat16 PyTorch's own takes twice as long.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        normed: torch.Tensor = rms_norm(x, (x.shape[-1],), weight, eps)
        return normed
    out, step = torch.empty_like(x), max(1, _BLOCK // x.shape[-1])
    for start in range(0, len(x), step):
        rows = x[start : start + step].float()
        out[start : start + step] = rows.mul_(_inverse_rms(rows, eps)).mul_(weight.float())
    return out


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return what normalises the last dimension, `(..., 1)`."""
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_rotate(x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, eps: float) -> torch.Tensor:
    """Return heads `(n_rows, heads, head_dim)`, normalised and rotated, all float32."""
    half, (cosine, sine) = x.shape[-1] // 2, cos_sin
    normed = (x * _inverse_rms(x, eps)).mul_(weight)
    first, second = normed.chunk(2, dim=-1)
    out = torch.empty_like(normed)
    torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=out[..., half:]).addcmul_(first, sine)
    return out
