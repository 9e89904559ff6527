"""The elementwise work against Transformers' own, and the fused kernels against PyTorch's operations."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from qwen_rerank.scorers.qwen.kernels import EagerOps, cpu_ops

kernels_numba = pytest.importorskip("qwen_rerank.scorers.qwen.kernels_numba")
NUMBA = kernels_numba.NumbaOps(most_threads=sys.maxsize)
BOTH = pytest.mark.parametrize("ops", [EagerOps(), NUMBA], ids=["pytorch", "numba"])


def draw(*shape: int, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).bfloat16()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_rotation_are_as_exact_as_transformers(ops, dtype):
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

    ours = ops.norm_rotate(x, weight, cos_sin, 1e-6)

    assert ours.dtype == dtype
    assert (ours.double() - exact()).abs().mean() <= 1.05 * (theirs(dtype) - exact()).abs().mean()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [0, 1, 300])
def test_the_norm_of_rows_is_as_exact_as_transformers(ops, dtype, n_rows):
    """Also of so many rows that they are taken in blocks; nothing else decides a row's bits."""
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(n_rows, 1024, generator=draw)).to(dtype)
    norm = Qwen3RMSNorm(1024, eps=1e-6).to(dtype)
    norm.weight.data = (1 + 0.2 * torch.randn(1024, generator=draw)).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()

    ours = ops.norm(x, norm.weight, 1e-6)

    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().sum() <= 1.05 * (norm(x).double() - exact).abs().sum()
    assert torch.equal(ours[-1:], ops.norm(x[-1:], norm.weight, 1e-6))


@BOTH
@pytest.mark.parametrize(("n_rows", "size"), [(0, 7), (1, 1), (40, 301)])
def test_the_gate_is_its_formula_rounded_once(ops, n_rows, size):
    """Up to where the exponential leaves float32."""
    gate_up = draw(n_rows, 2 * size, scale=40.0)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = gate * torch.sigmoid(gate) * up

    found = ops.gate(gate_up.clone()).double()

    # PyTorch's own operations round the gate as well, before it is multiplied.
    torch.testing.assert_close(found, exact, rtol=2**-8 if ops is NUMBA else 2**-7, atol=1e-30)


@BOTH
@pytest.mark.parametrize(("n_past", "n_rows", "heads"), [(0, 1, 1), (75, 64, 2), (5, 33, 3)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e30])
def test_the_softmax_is_its_formula_and_causal(ops, n_past, n_rows, heads, scale):
    weights = draw(2, heads * n_rows, n_past + n_rows, scale=scale)
    mask = torch.full((n_rows, n_rows), -math.inf, dtype=torch.bfloat16).triu_(1)
    hidden = torch.ones(n_rows, n_past + n_rows, dtype=torch.bool).triu_(n_past + 1).repeat(heads, 1)
    exact = weights.double().masked_fill_(hidden, -math.inf).softmax(-1)

    ops.causal_softmax(weights, mask)

    torch.testing.assert_close(weights.double(), exact, rtol=2**-8, atol=1e-30)
    assert not weights[:, hidden].any()


@pytest.mark.parametrize("size", [1, 72, 3072])
def test_rows_are_quantized_as_by_pytorchs_operations(size):
    """Of rows of unlike sizes, one of zeros and one that is tiny."""
    rows = draw(40, size) * (1 + torch.arange(40)[:, None] ** 3)
    rows[0], rows[1] = 0.0, 1e-33

    levels, scale = NUMBA.quantize(rows)
    expected, expected_scale = EagerOps().quantize(rows)

    assert torch.equal(scale, expected_scale)
    assert torch.equal(levels, expected)
    assert ((levels.double() - 128) * scale - rows.double()).abs().le(0.502 * scale.double() + 1e-31).all()


@BOTH
@pytest.mark.parametrize("bits", [0x7FC0, -0x40, 0x7F80, -0x80], ids=["nan", "-nan", "inf", "-inf"])
def test_what_is_no_number_does_not_become_one(ops, bits):
    """A broken checkpoint shows itself in the score, and in no row beside its own."""
    x = draw(3, 64)
    x.view(torch.int16)[1, 5] = bits
    assert not x[1, 5].isfinite()
    cos_sin = torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(3, 16, dtype=torch.bfloat16)
    levels, scale = ops.quantize(x)
    softened = x.clone().view(1, 3, 64)
    ops.causal_softmax(softened, torch.zeros(1, 1, dtype=torch.bfloat16))
    found = {
        "norm": ops.norm(x, x[0], 1e-6),
        "norm_rotate": ops.norm_rotate(x.view(3, 2, 32), x[0, :32], cos_sin, 1e-6).flatten(1),
        "gate": ops.gate(x.clone()),
        "quantize": (levels.float() - 128) * scale,
        "causal_softmax": softened[0],
    }
    if bits == -0x80:  # a gate that is closed, and a key that is hidden
        del found["gate"], found["causal_softmax"]

    for name, rows in found.items():
        assert not rows[1].isfinite().all(), name
        assert rows[[0, 2]].isfinite().all(), name


@pytest.mark.parametrize("n_rows", [0, 1, 9])
def test_a_slice_of_columns_is_rotated_into_what_is_given(n_rows):
    joined, weight, cos_sin = draw(n_rows, 7 * 32), draw(32), (draw(n_rows, 16), draw(n_rows, 16))
    heads, out = joined[:, 64:160].unflatten(1, (3, 32)), torch.full((n_rows, 3, 32), 7.0).bfloat16()
    before = joined.clone()

    NUMBA.norm_rotate(heads, weight, cos_sin, 1e-6, out=out)

    expected = EagerOps().norm_rotate(heads, weight, cos_sin, 1e-6)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0.02)
    assert torch.equal(joined, before)


def test_rows_that_lie_apart_are_quantized_too():
    rows = draw(7, 256)[:, 64:192]

    for found, expected in zip(NUMBA.quantize(rows), NUMBA.quantize(rows.clone()), strict=True):
        assert torch.equal(found, expected)


def test_a_kernel_gives_threads_at_once_what_it_gives_each_alone():
    gates, scores = [draw(200, 600 + 2 * i) for i in range(8)], [draw(4, 64, 100 + i) for i in range(8)]
    mask = torch.zeros(32, 32, dtype=torch.bfloat16)

    def work(i: int) -> torch.Tensor:
        weights = scores[i].clone()
        NUMBA.causal_softmax(weights, mask)
        return torch.cat([NUMBA.gate(gates[i]).flatten(), weights.flatten()])

    alone = [work(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = [list(pool.map(work, range(8))) for _ in range(5)]

    assert all(torch.equal(a, b) for found in together for a, b in zip(alone, found, strict=True))


def test_the_kernels_serve_bfloat16_of_few_threads_and_pytorch_the_rest(monkeypatch):
    ops = cpu_ops(torch.bfloat16)
    assert type(ops) is kernels_numba.NumbaOps
    assert type(cpu_ops(torch.float32)) is EagerOps
    gate_up = draw(500, 64)
    fused, eager = NUMBA.gate(gate_up), EagerOps().gate(gate_up.clone())
    assert not torch.equal(fused, eager)  # the one rounds once, the other twice

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(ops.gate(gate_up.clone()), fused)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(ops.gate(gate_up.clone()), eager)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("missing", "pip install", id="missing"),
        pytest.param("wrong", "differ from PyTorch's", id="wrong"),
        pytest.param("slow", "NUMBA_DISABLE_JIT", id="not compiled"),
    ],
)
@pytest.mark.parametrize("n_threads", [1, 8])
def test_without_numba_pytorchs_operations_serve_and_a_warning_says_so(monkeypatch, caplog, fault, said, n_threads):
    """Whatever number of threads PyTorch has where a model is loaded: its passes have others."""
    cpu_ops.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delitem(sys.modules, "qwen_rerank.scorers.qwen.kernels_numba")
    elif fault == "wrong":
        monkeypatch.setattr(kernels_numba, "_gate", lambda gate_up, out: out.fill(0))
    else:
        monkeypatch.setattr(kernels_numba.config, "DISABLE_JIT", 1)

    found = cpu_ops(torch.bfloat16)

    cpu_ops.cache_clear()
    assert type(found) is EagerOps
    assert "Numba cannot be used" in caplog.text
    assert said in caplog.text


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
