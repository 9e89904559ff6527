"""The elementwise work against Transformers' own."""

import os
import subprocess
import sys

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from qwen_rerank.scorers.qwen.kernels import EagerOps, norm_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_rotation_are_as_exact_as_transformers(dtype):
    """Mean error against float64, over enough heads that neither is lucky."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, 32, generator=draw).to(dtype)
    weight = (1 + 0.2 * torch.randn(32, generator=draw)).to(dtype)
    angles = 6 * torch.rand(64, 16, generator=draw)
    cos_sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def theirs(kind: torch.dtype) -> torch.Tensor:
        norm = Qwen3RMSNorm(32, eps=1e-6).to(kind)
        norm.weight.data = weight.to(kind)
        cosine, sine = (torch.cat((side, side), dim=-1).to(kind)[None] for side in cos_sin)
        heads = norm(x.to(kind)).transpose(0, 1)[None]
        return apply_rotary_pos_emb(heads, heads, cosine, sine)[0][0].transpose(0, 1).detach().double()

    def exact() -> torch.Tensor:
        scaled = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        first, second = scaled.chunk(2, dim=-1)
        cosine, sine = (side.double()[:, None] for side in cos_sin)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    ours = EagerOps().norm_rotate(x, weight, cos_sin, 1e-6)

    assert ours.dtype == dtype
    assert (ours.double() - exact()).abs().mean() <= 1.05 * (theirs(dtype) - exact()).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [0, 1, 300])
def test_the_norm_of_rows_is_as_exact_as_transformers(dtype, n_rows):
    """Also of so many rows that they are taken in blocks; nothing else decides a row's bits."""
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(n_rows, 1024, generator=draw)).to(dtype)
    norm = Qwen3RMSNorm(1024, eps=1e-6).to(dtype)
    norm.weight.data = (1 + 0.2 * torch.randn(1024, generator=draw)).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()

    ours = norm_rows(x, norm.weight, 1e-6)

    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().sum() <= 1.05 * (norm(x).double() - exact).abs().sum()
    assert torch.equal(ours[-1:], norm_rows(x[-1:], norm.weight, 1e-6))


_INTERPRETED = """
import torch
from qwen_rerank.scorers.qwen.kernels import EagerOps
from qwen_rerank.scorers.qwen.kernels_triton import TritonOps

ours, eager = TritonOps(), EagerOps()
for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
    for rows, heads, size in ((1, 1, 4), (5, 3, 32), (7, 16, 128), (0, 2, 32)):
        torch.manual_seed(rows)
        joined = torch.randn(rows, (heads + 1) * size, dtype=dtype)
        x = joined[:, size:].view(rows, heads, size) if rows else joined[:, size:].reshape(rows, heads, size)
        weight, angles = torch.randn(size, dtype=dtype), torch.randn(rows, size // 2)
        cos_sin = angles.cos().to(dtype), angles.sin().to(dtype)
        gate_up = torch.randn(rows, 2 * (size * heads + 3), dtype=dtype)
        torch.testing.assert_close(
            ours.norm_rotate(x, weight, cos_sin, 1e-6), eager.norm_rotate(x, weight, cos_sin, 1e-6),
            atol=allowed, rtol=allowed,
        )
        torch.testing.assert_close(ours.gate(gate_up.clone()), eager.gate(gate_up.clone()), atol=allowed, rtol=allowed)
print("equal")
"""


def test_the_triton_kernels_compute_what_pytorchs_operations_do():
    """In Triton's interpreter, which needs no GPU: every dtype, slices of columns, odd sizes, no rows."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )

    assert (done.stdout.strip(), done.returncode) == ("equal", 0), done.stderr[-2000:]


_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qwen_rerank.scorers.qwen import kernels_triton

for dtype in ("*bf16", "*fp16", "*fp32"):
    rows = dict.fromkeys(("x", "out", "weight", "cosine", "sine"), dtype)
    sizes = {"row_stride": "i32", "heads": "i32", "eps": "fp32", "half": "constexpr", "padded_heads": "constexpr"}
    norm = ASTSource(kernels_triton._norm_rotate, {**rows, **sizes}, {(8,): 64, (9,): 16})
    signature = {"x": dtype, "out": dtype, "size": "i32", "block": "constexpr"}
    gate = ASTSource(kernels_triton._gate, signature, {(3,): 1024})
    for source in (norm, gate):
        print("ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm)
"""


def test_the_triton_kernels_compile_for_a_cuda_device(tmp_path):
    """What the interpreter lets pass, the compiler may not; it needs no GPU either."""
    pytest.importorskip("triton")

    found = subprocess.run(
        [sys.executable, "-c", _COMPILED],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        timeout=240,
        check=False,
    )

    assert found.stdout.split() == ["True"] * 6, found.stderr
