"""Attention on the CPU, and the CUDA path's logic there: gathered keys, padded fallback, each PyTorch version's keywords."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank.scorers.qwen import attention_cpu, attention_cuda
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.attention_cuda import CudaAttention, choose_kernel, padded
from qwen_rerank.scorers.qwen.device import CUDA_BATCH, cuda_budget
from qwen_rerank.scorers.qwen.engine import Runner
from qwen_rerank.scorers.qwen.kernels import EagerOps, cpu_ops
from qwen_rerank.scorers.qwen.model import Forward
from qwen_rerank.scorers.qwen.packing import GroupSlice, PackedBatch, RowSpan, Segment, lay_out
from tests.scorers.qwen.tiny import groups_of, one_by_one, packed, tiny_config, tiny_model, tiny_weights

CPU = torch.device("cpu")


def draw(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(rows, heads, 16, generator=torch.Generator().manual_seed(rows + heads))


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    st.integers(0, 3),
    st.sampled_from([(), (7,), (3, 9)]),
    st.sampled_from([200, 1 << 24]),
)
def test_gathered_and_padded_attention_equals_the_loop(shapes, n_at_hand, shared_prefixes, limit):
    """For every mixture of shared prefixes and prefixes at hand and prefixes in the batch, and for every limit on one call."""
    groups = groups_of(shapes, shared_prefixes=shared_prefixes)
    past_groups = {group for group in groups[:n_at_hand] if len(group.prefix)}
    at_hand = list(dict.fromkeys(group.shared_prefix for group in groups[1:] if group.shared_prefix))
    batch = PackedBatch(tuple(GroupSlice(group, tuple(range(len(group.documents)))) for group in groups))
    layout = lay_out(batch, past_groups=past_groups, shared_prefixes=at_hand)
    n, n_past, n_documents = len(layout.ids), layout.n_past, len(layout.documents)
    query, keys = draw(n, 4), (draw(n, 2), draw(n + 1, 2)[1:])
    kept = (draw(n_past, 2) + 1, draw(n_past, 2)) if n_past else None
    loop, gathered = CpuAttention(torch.float32, EagerOps()), CudaAttention(padded, CPU)
    before = attention_cuda._MASK_ELEMENTS, attention_cuda._GATHERED_KEYS
    attention_cuda._MASK_ELEMENTS = attention_cuda._GATHERED_KEYS = limit
    try:
        plan = gathered.prepare(layout)
        for name, rows in (("all_rows", query), ("last_rows", draw(n_documents, 4))):
            expected = getattr(loop, name)(rows, keys, kept, loop.prepare(layout))
            torch.testing.assert_close(getattr(gathered, name)(rows, keys, kept, plan), expected)
    finally:
        attention_cuda._MASK_ELEMENTS, attention_cuda._GATHERED_KEYS = before


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_bytes", [1 << 20, 1])
@pytest.mark.parametrize(("n_past", "n_rows"), [(0, 1), (75, 64), (0, 130), (75, 67), (600, 70), (2000, 300)])
def test_attention_on_the_cpu_is_causal_and_about_as_exact_as_pytorchs_own(
    monkeypatch, dtype, weight_bytes, n_past, n_rows
):
    """Mean error against float64, behind keys of an earlier pass, with all heads at once and one at a time.

    In bfloat16 the scores are rounded before the softmax, as in the recipe's eager attention; PyTorch's kernel keeps them.
    """
    monkeypatch.setattr(attention_cpu, "_WEIGHT_BYTES", weight_bytes)
    made = torch.Generator().manual_seed(n_past + n_rows)
    query, *parts = (torch.randn(n_past + n_rows, heads, 32, generator=made).to(dtype) for heads in (4, 2, 2))
    query, (past, kv) = query[n_past:], zip(*((part[:n_past], part[n_past:]) for part in parts), strict=True)
    segment = Segment(RowSpan(0, n_rows), (RowSpan(0, n_past, past=True),))
    ours = CpuAttention(dtype, cpu_ops(dtype)).all_rows(query, kv, past, ([segment], []))

    def theirs(kind: torch.dtype) -> torch.Tensor:
        heads = (rows.to(kind).transpose(0, 1)[None] for rows in (query, *parts))
        hidden = torch.ones(n_rows, n_past + n_rows, dtype=torch.bool).triu_(n_past + 1)
        mask = torch.zeros(hidden.shape, dtype=kind).masked_fill_(hidden, float("-inf"))
        found = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return found[0].transpose(0, 1).double()

    exact = theirs(torch.float64)
    assert (ours.double() - exact).abs().mean() <= 2 * (theirs(dtype) - exact).abs().mean() + 1e-7


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

    def v211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0)
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    def v212(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, num_splits=None
    ):
        assert window_size == (-1, 0)
        assert enable_gqa or query.shape[1] == key.shape[1]
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    return {"2.10": v210, "2.11": v211, "2.12": v212}[version]


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        pytest.param([], "padded", id="nothing installed"),
        pytest.param([("2.12", True)], "2.12", id="PyTorch 2.12"),
        pytest.param([("2.11", True)], "2.11", id="PyTorch 2.11, without a word for grouped heads or pages"),
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


def test_flash_attention_gets_the_keywords_of_its_own():
    """Causal, without dropout, and with as many key heads as there are."""

    def flash(query, key, value, query_ends, key_ends, max_query, max_key, dropout_p, causal):
        assert (dropout_p, causal) == (0.0, True)
        return fake_torch("2.11")(query, key, value, query_ends, key_ends, max_query, max_key, window_size=(-1, 0))

    rows = attention_cuda._trial(4, 2, 16, torch.float32, CPU)
    torch.testing.assert_close(attention_cuda._flash(flash)(*rows), padded(*rows))


GROUPS = groups_of([(75, [17] * 9), (0, [5, 130]), (120, [1, 64, 30])])


@pytest.fixture(scope="module")
def exact():
    return one_by_one(tiny_model().double(), GROUPS)


@pytest.mark.parametrize("version", ["2.10", "2.11", "2.12"])
@pytest.mark.parametrize("token_budget", [2000, 150])
def test_scores_of_the_cuda_path_equal_the_recipes(exact, version, token_budget):
    """Everything but the kernel itself: layouts, kept prefixes, gathered keys, last rows."""
    weights = tiny_weights(dict(tiny_model().state_dict()), dtype=torch.float32, device="cpu")
    kernel = attention_cuda._varlen(fake_torch(version), repeat=version == "2.10")
    forward = Forward(weights, tiny_config(), CudaAttention(kernel, CPU), EagerOps(), row_chunk=64)
    ours = packed(Runner(forward, deterministic=False), GROUPS, token_budget=token_budget)

    np.testing.assert_allclose(ours, exact, atol=1e-5)


class FakeGpu:
    """A device of so much free memory, on which a pass takes `per_token` bytes for each token above what is held."""

    def __init__(self, *, free: int, per_token: int, reserved: int = 0) -> None:
        self.free, self.per_token, self.reserved = free, per_token, reserved
        self.peak = 0

    def run(self, tokens: int) -> None:
        self.peak = max(self.peak, 1000 + self.per_token * tokens)

    def install(self, monkeypatch) -> None:
        fakes = {
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", 0),
            "synchronize": lambda _: None,
            "empty_cache": lambda: None,
            "max_memory_allocated": lambda _: self.peak,
            "memory_allocated": lambda _: 1000,
            "memory_reserved": lambda _: self.reserved,
            "mem_get_info": lambda _: (self.free, 2 * self.free),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize(
    ("gpu", "cap_gb", "tokens"),
    [
        pytest.param({"free": 10**9, "per_token": 10**5}, None, 8000, id="a share of what is free"),
        pytest.param({"free": 10**12, "per_token": 10**5}, None, CUDA_BATCH, id="not more than gains speed"),
        pytest.param({"free": 10**12, "per_token": 2**20}, 2.0, 1638, id="a cap"),
        pytest.param({"free": 10**12, "per_token": 2**20, "reserved": 2**30}, 2.0, 819, id="less what is taken"),
        pytest.param({"free": 10**6, "per_token": 10**5}, None, 256, id="hardly any memory"),
    ],
)
def test_the_batch_size_follows_the_memory_that_a_trial_takes(monkeypatch, gpu, cap_gb, tokens):
    fake = FakeGpu(**gpu)
    fake.install(monkeypatch)

    assert cuda_budget(fake.run, torch.device("cuda:0"), cap_gb=cap_gb) == tokens
