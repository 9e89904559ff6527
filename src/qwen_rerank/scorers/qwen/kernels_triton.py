"""The elementwise work in Triton kernels, one pass each; Triton comes with PyTorch's CUDA builds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen_rerank.scorers.qwen.kernels import CosSin, EagerOps

_COLUMNS = 1024  # of a gate that one program computes


# Triton looks up what parameters are annotated with, and knows only types of its own: the others have none.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _norm_rotate(  # type: ignore[no-untyped-def]
    x,
    out,
    weight,
    cosine,
    sine,
    row_stride,
    heads,
    eps,
    half: tl.constexpr,
    padded_heads: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, padded_heads)[:, None]
    lane = tl.arange(0, half)[None, :]
    inside = (head < heads) & (lane < half)
    source = x + row * row_stride + head * (2 * half) + lane
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    square = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * half)
    scale = (1.0 / tl.sqrt(square + eps))[:, None]
    first = first * scale * tl.load(weight + lane).to(tl.float32)
    second = second * scale * tl.load(weight + half + lane).to(tl.float32)
    c = tl.load(cosine + row * half + lane).to(tl.float32)
    s = tl.load(sine + row * half + lane).to(tl.float32)
    target = out + (row * heads + head) * (2 * half) + lane
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gate(x, out, size, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(x + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + column, value.to(out.dtype.element_ty), mask=inside)


class TritonOps(EagerOps):
    """As `EagerOps`, whose norm of rows it keeps; sums and products in float32, rounded once."""

    def norm_rotate(
        self, x: torch.Tensor, weight: torch.Tensor, cos_sin: CosSin, eps: float, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise every head of `x` and apply the rotary positions; `x` may be a slice of columns."""
        rows, heads, size = x.shape
        out = torch.empty(rows, heads, size, dtype=x.dtype, device=x.device) if out is None else out
        if rows:
            _norm_rotate[(rows,)](
                x,
                out,
                weight,
                cos_sin[0].contiguous(),
                cos_sin[1].contiguous(),
                x.stride(0),
                heads,
                eps,
                size // 2,
                triton.next_power_of_2(heads),
            )
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up`."""
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
        if rows:
            _gate[(rows, triton.cdiv(size, _COLUMNS))](gate_up, out, size, _COLUMNS)
        return out


def check_triton(ops: TritonOps, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare the kernels with PyTorch's operations; this also compiles them before the first call.

    Raises:
        RuntimeError: If they cannot be used here, or differ by more than rounding.
    """
    half = head_dim // 2
    if half & (half - 1):
        raise RuntimeError(f"head_dim {head_dim} is no power of two")
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    joined, weight, cos_sin = draw(5, 7 * head_dim), draw(head_dim), (draw(5, half), draw(5, half))
    heads = joined[:, head_dim:].view(5, 6, head_dim)
    gate_up, eager = draw(3, 2600), EagerOps()
    pairs = [
        (ops.norm_rotate(heads, weight, cos_sin, 1e-6), eager.norm_rotate(heads, weight, cos_sin, 1e-6)),
        (ops.gate(gate_up.clone()), eager.gate(gate_up.clone())),
    ]
    allowed = 1e-4 if dtype == torch.float32 else 0.05
    for ours, expected in pairs:
        if not torch.allclose(ours, expected, rtol=allowed, atol=allowed):
            raise RuntimeError("the kernels differ from PyTorch's operations")
