"""The elementwise work between the matrix products: in PyTorch's own operations, and which kernels do it on a CPU."""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch
from torch.nn.functional import rms_norm, silu

from qwen_rerank.extras import pip_line
from qwen_rerank.models.names import first_line

KV = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (n_rows, n_kv_heads, head_dim)
CosSin = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of each row's position, each (n_rows, head_dim // 2)

LEVELS = 127
ZERO_POINT = 128  # oneDNN's kernels for VNNI take unsigned activations
TINY = 1e-30  # a scale that keeps a row of zeros from 0 / 0
# A scale is rounded to bfloat16, so that a bfloat16 product is scaled by what the row was divided by. Nearest rounding
# takes at most a factor of 1 + 2**-8 off it; raised by as much, no level exceeds 127.
HEADROOM = 1 + 2**-8

_BLOCK = 1 << 18  # float32 numbers that an operation on a CPU leaves in the cores' own caches for the next one
logger = logging.getLogger(__name__)


class Ops(Protocol):
    """The elementwise operations that a device may have a fused kernel for."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the RMS norm of rows `(n_rows, size)` in their dtype, computed in float32 and rounded once."""
        ...

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


class EagerOps:
    """Works everywhere, one pass over the data an operation; `causal_softmax` and `quantize` on a CPU only."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the RMS norm of rows; by hand on a CPU in bfloat16, where PyTorch's own takes twice as long."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            normed: torch.Tensor = rms_norm(x, (x.shape[-1],), weight, eps)
            return normed
        out, step = torch.empty_like(x), max(1, _BLOCK // x.shape[-1])
        for start in range(0, len(x), step):
            rows = x[start : start + step].float()
            out[start : start + step] = rows.mul_(_inverse_rms(rows, eps)).mul_(weight.float())
        return out

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

    def causal_softmax(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Replace scores by attention weights, in place; every row sees all keys before the rows' own.

        Args:
            weights: `(n, heads * n_rows, n_keys)`, dense; the last `n_rows` keys are the rows' own.
            mask: `(n_rows, n_rows)`, the causal one: -inf above the diagonal, zeros elsewhere.
        """
        own = weights.view(len(weights), -1, len(mask), weights.shape[2])[..., weights.shape[2] - len(mask) :]
        own.add_(mask)
        torch.softmax(weights, dim=-1, out=weights)

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return levels, uint8 `(n, in)` around 128, and each row's scale `(n, 1)` in the rows' dtype.

        A row with NaN or infinity has a scale that is not finite, and so has its product.
        """
        levels = torch.empty(rows.shape, dtype=torch.int8)
        scale = torch.empty(len(rows), 1)
        step = max(1, _BLOCK // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            exact = rows[block].float()
            # Two reductions take two thirds of the time of one over absolute values, which have to be written first.
            largest = torch.maximum(exact.amax(dim=1, keepdim=True), exact.amin(dim=1, keepdim=True).neg_())
            rounded = (largest * (HEADROOM / LEVELS)).clamp_min_(TINY).bfloat16().float()
            levels[block] = (exact * rounded.reciprocal()).round_()
            scale[block] = rounded
        # To int8 and one flipped bit, which adds 128: PyTorch's conversion to uint8 is eight times as slow.
        return levels.view(torch.uint8).bitwise_xor_(ZERO_POINT), scale.to(rows.dtype)


@functools.cache
def cpu_ops(dtype: torch.dtype) -> EagerOps:
    """Return the operations of a CPU: in bfloat16 fused kernels where Numba is there and right, else PyTorch's own."""
    if dtype != torch.bfloat16:
        return EagerOps()
    try:
        from qwen_rerank.scorers.qwen.kernels_numba import NumbaOps, check_numba

        check_numba()
        return NumbaOps()
    except Exception as exc:  # a Numba of another NumPy or LLVM shows itself in many ways
        way_out = f"; {pip_line('local')} brings it" if isinstance(exc, ModuleNotFoundError) else ""
        logger.warning(
            "Numba cannot be used (%s), so PyTorch's own operations serve, which are slower in bfloat16%s.",
            first_line(exc),
            way_out,
        )
        return EagerOps()


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
