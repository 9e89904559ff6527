"""The CUDA path. Needs a GPU, and neither hypothesis nor a network: `python eval/speed/gpu.py` runs it."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from qwen_rerank import QwenScorer
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.scorers.qwen.attention_cuda import CudaAttention, candidates, choose_kernel, padded
from qwen_rerank.scorers.qwen.device import choose_device, choose_dtype
from qwen_rerank.scorers.qwen.engine import Runner
from qwen_rerank.scorers.qwen.kernels import EagerOps
from qwen_rerank.scorers.qwen.model import Forward
from tests.scorers.qwen.tiny import groups_of, one_by_one, packed, tiny_config, tiny_model, tiny_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda:0"
SHAPES = [(75, [17] * 40), (0, [5, 900]), (600, [1, 64, 300]), (13, [130])]
TEXTS = ["Beijing is the capital of China.", "北京是中国的首都。" * 9, "", "a long text " * 300, "🐼" * 9]


def forward_on(dtype: torch.dtype, *, kernel=None, ops=None) -> Forward:
    weights = tiny_weights(dict(tiny_model().state_dict()), dtype=dtype, device=DEVICE)
    shape, device = tiny_config(), torch.device(DEVICE)
    heads = {"n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads, "head_dim": shape.head_dim}
    kernel = kernel or choose_kernel(**heads, dtype=dtype, device=device)
    return Forward(weights, shape, CudaAttention(kernel, device), ops or EagerOps(), row_chunk=512)


@pytest.fixture(scope="module")
def exact():
    return one_by_one(tiny_model().double(), groups_of(SHAPES))


@pytest.mark.parametrize("token_budget", [10_000, 300])
def test_float32_scores_equal_the_recipes(exact, token_budget):
    ours = packed(Runner(forward_on(torch.float32), deterministic=False), groups_of(SHAPES), token_budget=token_budget)

    assert np.abs(ours - exact).max() <= 1e-4


@pytest.mark.parametrize("name", ["chosen", "padded", "triton"])
def test_bfloat16_scores_are_as_close_as_the_recipes(exact, name):
    """Rounding differs from the recipe's; its size does not."""
    ops = None
    if name == "triton":
        from qwen_rerank.scorers.qwen.kernels_triton import TritonOps

        ops = TritonOps()
    forward = forward_on(torch.bfloat16, kernel=padded if name == "padded" else None, ops=ops)
    ours = packed(Runner(forward, deterministic=False), groups_of(SHAPES), token_budget=900)
    theirs = one_by_one(tiny_model().to(DEVICE, torch.bfloat16), groups_of(SHAPES), device=DEVICE)

    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max()


def test_the_kernels_agree_with_pytorch():
    from qwen_rerank.scorers.qwen.kernels_triton import TritonOps, check_triton

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_triton(TritonOps(), head_dim=128, dtype=dtype, device=torch.device(DEVICE))


def test_flash_attention_is_used_where_it_is_there():
    if not list(candidates()) or torch.cuda.get_device_capability(DEVICE) < (8, 0):
        pytest.skip("this PyTorch or device has no variable-length flash attention")

    kernel = choose_kernel(n_heads=16, n_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=torch.device(DEVICE))
    assert kernel is not padded


def test_auto_is_the_gpu_in_half_precision():
    device = choose_device("auto")

    assert device.type == "cuda"
    assert choose_dtype("auto", device, torch.float32) in (torch.bfloat16, torch.float16)
    with pytest.raises(InvalidInputError, match="is not there"):
        choose_device("cuda:99")


@pytest.fixture(scope="module")
def deterministic(checkpoint_of):
    with QwenScorer(str(checkpoint_of(head_dim=64)), deterministic=True, max_length=512) as made:
        yield made


def test_deterministic_scores_do_not_depend_on_their_company(deterministic):
    alone = {text: deterministic.score("q", [text])[0] for text in TEXTS}
    draw = np.random.default_rng(0)
    calls = [[TEXTS[i] for i in draw.integers(len(TEXTS), size=6)] for _ in range(64)]
    with ThreadPoolExecutor(64) as pool:
        scores = list(pool.map(lambda texts: deterministic.score("q", texts).tolist(), calls))

    assert scores == [[alone[text] for text in texts] for texts in calls]


def test_threads_and_coroutines_are_answered(checkpoint_of):
    async def coroutines(scorer):
        return await asyncio.gather(*(scorer.ascore("q", TEXTS) for _ in range(16)))

    with QwenScorer(str(checkpoint_of(head_dim=64)), max_length=512) as scorer, ThreadPoolExecutor(16) as pool:
        expected = scorer.score("q", TEXTS)
        found = [*pool.map(lambda _: scorer.score("q", TEXTS), range(16)), *asyncio.run(coroutines(scorer))]

    np.testing.assert_allclose(found, np.tile(expected, (32, 1)), atol=0.1)


def test_memory_stays_below_the_cap(checkpoint_of):
    """Also with far more work than fits: batches shrink until they fit, and every document is scored."""
    cap_gb = 1.0
    options = {"gpu_memory_gb": cap_gb, "token_budget": 4_000_000, "max_length": 512, "dtype": "float32"}
    try:
        with QwenScorer(str(checkpoint_of(head_dim=64, intermediate=8192)), **options) as scorer:
            torch.cuda.reset_peak_memory_stats()
            scores = scorer.score("q", [f"{i} " + "word " * 400 for i in range(3000)])
            assert scorer.token_budget < 4_000_000
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert np.isfinite(scores).all()
    assert torch.cuda.max_memory_reserved() <= cap_gb * 2**30


def test_the_batch_size_is_measured(checkpoint_of, caplog):
    with caplog.at_level(logging.INFO), QwenScorer(str(checkpoint_of()), max_length=512) as scorer:
        assert 256 <= scorer.token_budget <= 32_768
    assert "bytes a token" in caplog.text
