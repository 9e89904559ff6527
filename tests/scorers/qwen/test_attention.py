"""The CUDA path's logic, on the CPU: gathered keys, padded fallback, and the keywords of each PyTorch version."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank.packing import Branch, Pack
from qwen_rerank.scorers.qwen import attention_cuda
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.attention_cuda import CudaAttention, choose_kernel, padded
from qwen_rerank.scorers.qwen.layout import lay_out

from .tiny import trees_of

CPU = torch.device("cpu")


def draw(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(rows, heads, 16, generator=torch.Generator().manual_seed(rows + heads))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    st.integers(0, 3),
    st.sampled_from([200, 1 << 24]),
)
def test_gathered_and_padded_attention_equals_the_loop(shapes, n_kept, limit):
    """For every mixture of prefixes at hand and prefixes in the pack, and for every limit on one call."""
    trees = trees_of(shapes)
    kept_trees = {tree for tree in trees[:n_kept] if len(tree.prefix)}
    layout = lay_out(Pack(tuple(Branch(tree, tuple(range(len(tree.documents)))) for tree in trees)), kept=kept_trees)
    n, n_past, n_documents = len(layout.ids), sum(len(tree.prefix) for tree in layout.kept), len(layout.documents)
    query, keys = draw(n, 4), (draw(n, 2), draw(n + 1, 2)[1:])
    kept = (draw(n_past, 2) + 1, draw(n_past, 2)) if n_past else None
    loop, gathered = CpuAttention(torch.float32), CudaAttention(padded, CPU)
    before = attention_cuda._MASK_ELEMENTS, attention_cuda._GATHERED_KEYS
    attention_cuda._MASK_ELEMENTS = attention_cuda._GATHERED_KEYS = limit
    try:
        plan = gathered.prepare(layout)
        for name, rows in (("all_rows", query), ("last_rows", draw(n_documents, 4))):
            expected = getattr(loop, name)(rows, keys, kept, loop.prepare(layout))
            torch.testing.assert_close(getattr(gathered, name)(rows, keys, kept, plan), expected)
    finally:
        attention_cuda._MASK_ELEMENTS, attention_cuda._GATHERED_KEYS = before


def fake_torch(version: str, *, right: bool = True):
    """A stand-in for `varlen_attn` with the keywords of a version."""

    def attend(query, key, value, query_ends, key_ends, max_query, max_key):
        assert query_ends.dtype == key_ends.dtype == torch.int32
        lengths = [(ends[1:] - ends[:-1]).tolist() for ends in (query_ends, key_ends)]
        assert (max_query, max_key) == (max(lengths[0]), max(lengths[1]))
        segments = attention_cuda.Ragged(torch.arange(len(key)), query_ends, key_ends, *lengths)
        return padded(query, key, value, segments) + (0 if right else 1)

    def v210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal
        assert query.shape[1] == key.shape[1]
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    def v212(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, num_splits=None
    ):
        assert window_size == (-1, 0)
        assert enable_gqa or query.shape[1] == key.shape[1]
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    return {"2.10": v210, "2.12": v212}[version]


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        pytest.param([], "padded", id="nothing installed"),
        pytest.param([("2.12", True)], "2.12", id="PyTorch 2.12"),
        pytest.param([("2.10", True)], "2.10 repeated", id="PyTorch 2.10 asks for as many key heads"),
        pytest.param([("2.12", False)], "padded", id="a kernel with other results is not used"),
        pytest.param([("2.12", False), ("2.10", True)], "2.10 repeated", id="the next one is tried"),
    ],
)
def test_the_kernel_is_chosen_by_trial(monkeypatch, candidates, chosen):
    kernels = {"padded": padded}
    for version, right in candidates:
        function = fake_torch(version, right=right)
        kernels[version] = attention_cuda._varlen(function, repeat=False)
        kernels[f"{version} repeated"] = attention_cuda._varlen(function, repeat=True)
    offered = [(name, kernel) for name, kernel in kernels.items() if name != "padded"]
    monkeypatch.setattr(attention_cuda, "candidates", lambda: iter(offered))
    kernel = choose_kernel(n_heads=4, n_kv_heads=2, head_dim=16, dtype=torch.float32, device=CPU)

    assert kernel is kernels[chosen]


def test_this_pytorch_falls_back_on_the_cpu():
    """Its variable-length kernel exists, but only for CUDA."""
    assert choose_kernel(n_heads=4, n_kv_heads=2, head_dim=16, dtype=torch.float32, device=CPU) is padded
