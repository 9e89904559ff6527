"""The elementwise work of a CPU in bfloat16, each a single pass that Numba compiles to vector instructions.

PyTorch's own operations write a result, often in float32, for the next to read; these read bfloat16, compute in float32 and
round once. bfloat16 is the upper half of a float32, which Numba has no type for: numbers come and go as 16-bit integers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import config, njit

from qwen_rerank.scorers.qwen.kernels import HEADROOM, LEVELS, TINY, ZERO_POINT, CosSin, EagerOps

_NAN = np.uint16(0x7FC0)
_ROUNDING = np.float32(1.5 * 2**23)  # added to a small number, leaves its nearest integer in the low bits
_EXP_RANGE = np.float32(-87.0), np.float32(88.0)  # beyond, e**x is no normal float32
_LOG2_E = np.float32(1.4426950408889634)
_LN2 = np.float32(0.6931471805599453)
_f32, _u32, _u16, _i16, _u8 = np.float32, np.uint32, np.uint16, np.int16, np.uint8

_OPTIONS: Any = {"nogil": True, "error_model": "numpy"}
# What LLVM may do beyond IEEE's rules: round a product and a sum once; take a sum in another order, which vectors need.
# It may assume nothing of NaN and infinity.
_ROUNDED_ONCE, _ANY_ORDER = {"contract"}, {"contract", "reassoc"}


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that becomes a part of those that call it, with their rules."""
    compiled: Callable[..., Any] = njit(inline="always", **_OPTIONS)(function)
    return compiled


def _sum(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = njit(fastmath=_ANY_ORDER, **_OPTIONS)(function)
    return compiled


def _kernel(function: Callable[..., Any], *, rules: set[str] = _ROUNDED_ONCE) -> Callable[..., Any]:
    """Return the function, compiled at its first call and kept on disk for later processes where there is a folder for it."""
    compiled: Callable[..., Any]
    try:
        compiled = njit(cache=True, fastmath=rules, **_OPTIONS)(function)
    except RuntimeError:  # no folder
        compiled = njit(fastmath=rules, **_OPTIONS)(function)
    return compiled


# Every integer operation is cast back: Numba widens results to 64 bits, of which a vector holds half as many.


@_inline
def _wide(x):  # type: ignore[no-untyped-def]
    """Return the float32 of a bfloat16's bits."""
    return _u32(_u32(x) << _u32(16)).view(_f32)


@_inline
def _narrow(x):  # type: ignore[no-untyped-def]
    """Return the bits of the nearest bfloat16, of two the even one."""
    bits = _f32(x).view(_u32)
    odd = _u32(_u32(bits >> _u32(16)) & _u32(1))
    return _u16(_u32(_u32(bits + _u32(0x7FFF) + odd) >> _u32(16))) if x == x else _NAN


@_inline
def _exp(x):  # type: ignore[no-untyped-def]
    """Return e**x, off by at most 1e-5 of it, which is a 200th of what rounding to bfloat16 may take.

    As 2**n * e**r with |r| <= ln(2) / 2, the latter by the first terms of its series.
    """
    x = min(max(x, _EXP_RANGE[0]), _EXP_RANGE[1])
    shifted = x * _LOG2_E + _ROUNDING
    r = x - (shifted - _ROUNDING) * _LN2
    series = _f32(1 / 120) * r + _f32(1 / 24)
    series = series * r + _f32(1 / 6)
    series = series * r + _f32(1 / 2)
    series = series * r + _f32(1)
    series = series * r + _f32(1)
    power = _u32(
        _u32(_f32(shifted).view(_u32) << _u32(23)) + _u32(0x3F800000)
    )  # n, in the low bits, becomes the exponent
    return series * power.view(_f32)


@_inline
def _ordered(x):  # type: ignore[no-untyped-def]
    """Return a bfloat16's bits as an integer that is greater where the number is; it is its own inverse."""
    bits = _i16(x)
    return _i16(bits ^ _i16(_i16(bits >> _i16(15)) & _i16(0x7FFF)))


@_sum
def _sum_of_squares(row):  # type: ignore[no-untyped-def]
    total = _f32(0)
    for j in range(len(row)):
        x = _wide(row[j])
        total += x * x
    return total


@_sum
def _sum_of(row):  # type: ignore[no-untyped-def]
    total = _f32(0)
    for j in range(len(row)):
        total += row[j]
    return total


@_inline
def _inverse_rms(row, eps):  # type: ignore[no-untyped-def]
    return _f32(1) / np.sqrt(_sum_of_squares(row) / _f32(len(row)) + eps)


@_kernel
def _norm(rows, weight, eps, out):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        row, to = rows[i], out[i]
        scale = _inverse_rms(row, eps)
        for j in range(len(row)):
            to[j] = _narrow(_wide(row[j]) * scale * _wide(weight[j]))


@_kernel
def _norm_rotate(flat, stride, weight, cosine, sine, eps, out):  # type: ignore[no-untyped-def]
    size = len(weight)
    half = size // 2
    weight1, weight2 = weight[:half], weight[half:]
    for i in range(len(out)):
        c, s = cosine[i], sine[i]
        for head in range(out.shape[1]):
            row, to = flat[i * stride + head * size : i * stride + head * size + size], out[i, head]
            x1, x2, y1, y2 = row[:half], row[half:], to[:half], to[half:]
            scale = _inverse_rms(row, eps)
            for j in range(half):
                first = _wide(x1[j]) * scale * _wide(weight1[j])
                second = _wide(x2[j]) * scale * _wide(weight2[j])
                y1[j] = _narrow(first * _wide(c[j]) - second * _wide(s[j]))
                y2[j] = _narrow(second * _wide(c[j]) + first * _wide(s[j]))


@_kernel
def _gate(gate_up, out):  # type: ignore[no-untyped-def]
    size = out.shape[1]
    for i in range(len(out)):
        gate, up, to = gate_up[i, :size], gate_up[i, size:], out[i]
        for j in range(size):
            x = _wide(gate[j])
            to[j] = _narrow(x / (_f32(1) + _exp(-x)) * _wide(up[j]))


@_kernel
def _causal_softmax(weights, n_own):  # type: ignore[no-untyped-def]
    n_keys = weights.shape[2]
    terms = np.empty(n_keys, np.float32)
    for head in range(weights.shape[0]):
        for i in range(weights.shape[1]):
            n_seen = n_keys - n_own + i % n_own + 1
            row, hidden = weights[head, i, :n_seen], weights[head, i, n_seen:]
            largest = _i16(-32768)
            for j in range(n_seen):
                largest = max(largest, _ordered(row[j]))
            shift = _wide(_u16(_ordered(_u16(largest))))
            for j in range(n_seen):
                terms[j] = _exp(_wide(row[j]) - shift)
            scale = _f32(1) / _sum_of(terms[:n_seen])
            for j in range(n_seen):
                row[j] = _narrow(terms[j] * scale)
            for j in range(len(hidden)):
                hidden[j] = 0


@functools.partial(_kernel, rules=set())  # the same levels as PyTorch's operations give
def _quantize(rows, step, tiny, zero_point, levels, scale):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        row, to = rows[i], levels[i]
        largest = _u16(0)
        for j in range(len(row)):
            # Bits without the sign are in the order of the absolute values, NaN above all.
            largest = max(largest, _u16(row[j] & _u16(0x7FFF)))
        rounded = _narrow(max(_wide(largest) * step, tiny)) if largest <= _u16(0x7F80) else _NAN
        scale[i] = rounded
        inverse = _f32(1) / _wide(rounded)
        for j in range(len(row)):
            level = _u8(_f32(_wide(row[j]) * inverse + _ROUNDING).view(_u32))
            to[j] = _u8(level ^ zero_point)


class NumbaOps(EagerOps):
    """As `EagerOps`, which it leaves other dtypes to, and operations of more threads.

    Args:
        most_threads: Of PyTorch, up to which a kernel serves; it runs on one thread, and is overtaken by three.
    """

    def __init__(self, most_threads: int = 2) -> None:
        self._most_threads = most_threads

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the RMS norm of rows `(n_rows, size)`."""
        if not self._serves(x):
            return super().norm(x, weight, eps)
        out = torch.empty_like(x)
        _norm(_bits(x), _bits(weight), np.float32(eps), _bits(out))
        return out

    def norm_rotate(
        self, x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, eps: float, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise every head of `x` and apply the rotary positions; `x` may be a slice of columns."""
        if not self._serves(x) or x.stride()[1:] != (x.shape[2], 1):
            return super().norm_rotate(x, weight, cos_sin, eps, out=out)
        out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
        if len(x):
            # From the first number to the last, as they lie: dense, so that Numba knows that neighbours are.
            flat = x.as_strided(((len(x) - 1) * x.stride(0) + x[0].numel(),), (1,))
            cosine, sine = cos_sin
            _norm_rotate(
                _bits(flat), x.stride(0), _bits(weight), _bits(cosine), _bits(sine), np.float32(eps), _bits(out)
            )
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up`."""
        if not self._serves(gate_up):
            return super().gate(gate_up)
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        _gate(_bits(gate_up), _bits(out))
        return out

    def causal_softmax(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Replace scores by attention weights."""
        if self._serves(weights):
            _causal_softmax(_bits(weights), len(mask))
        else:
            super().causal_softmax(weights, mask)

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return levels and scales of rows."""
        if not self._serves(rows):
            return super().quantize(rows)
        levels, scale = torch.empty(rows.shape, dtype=torch.uint8), rows.new_empty(len(rows), 1)
        step, tiny, zero_point = np.float32(HEADROOM / LEVELS), np.float32(TINY), np.uint8(ZERO_POINT)
        _quantize(_bits(rows.contiguous()), step, tiny, zero_point, levels.numpy(), _bits(scale)[:, 0])
        return levels, scale

    def _serves(self, x: torch.Tensor) -> bool:
        return x.dtype == torch.bfloat16 and torch.get_num_threads() <= self._most_threads


def _bits(x: torch.Tensor) -> np.ndarray:
    """Return a dense bfloat16 tensor's numbers as 16-bit integers, in place."""
    return x.view(torch.uint16).numpy()


def check_numba() -> None:
    """Compare the kernels with PyTorch's operations; this also compiles them before the first call.

    Raises:
        RuntimeError: If they differ by more than rounding, or would run as plain Python.
    """
    if getattr(config, "DISABLE_JIT", False):
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    generator, eager = torch.Generator().manual_seed(0), EagerOps()
    ops = NumbaOps(most_threads=sys.maxsize)  # whatever this thread's number is, others compute with one

    def draw(*shape: int) -> torch.Tensor:
        return (3 * torch.randn(*shape, generator=generator)).bfloat16()

    joined, weight, cos_sin = draw(5, 7 * 32), draw(32), (draw(5, 16), draw(5, 16))
    heads, gate_up = joined[:, 32:].view(5, 6, 32), draw(3, 2600)
    scores, mask = draw(2, 2 * 7, 19), torch.full((7, 7), float("-inf"), dtype=torch.bfloat16).triu_(1)
    softened = scores.clone(), scores.clone()
    for each, weights in zip((ops, eager), softened, strict=True):
        each.causal_softmax(weights, mask)
    (levels, scale), (eager_levels, eager_scale) = ops.quantize(gate_up), eager.quantize(gate_up)
    pairs = [
        (ops.norm(joined, joined[0], 1e-6), eager.norm(joined, joined[0], 1e-6), 0.01),
        (ops.norm_rotate(heads, weight, cos_sin, 1e-6), eager.norm_rotate(heads, weight, cos_sin, 1e-6), 0.05),
        (ops.gate(gate_up), eager.gate(gate_up.clone()), 0.05),
        (*softened, 1e-3),
        (scale, eager_scale, 1e-6),
        # A level that is a tie may be rounded either way.
        ((levels.float() - ZERO_POINT) * scale, (eager_levels.float() - ZERO_POINT) * eager_scale, float(scale.max())),
    ]
    for ours, expected, allowed in pairs:
        if not torch.allclose(ours.float(), expected.float(), rtol=2**-6, atol=allowed):
            raise RuntimeError("the kernels differ from PyTorch's operations")
