"""The packed forward pass against Transformers' own Qwen3, one prompt at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_rerank.packing import Pack, Tree, plan_packs
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.forward import Forward
from qwen_rerank.scorers.qwen.layout import lay_out
from qwen_rerank.scorers.qwen.runner import Runner
from qwen_rerank.scorers.qwen.weights import fuse

YES, NO, VOCABULARY, MAX_LENGTH = 7, 9, 500, 8192


def tiny_config() -> QwenModelConfig:
    return QwenModelConfig(
        kind="causal",
        tied=False,
        hidden_size=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        intermediate_size=96,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        vocab_size=VOCABULARY,
        max_positions=MAX_LENGTH,
    )


def tiny_model() -> Qwen3ForCausalLM:
    """A random model whose norms are not all one, with log-odds of about -5 to 5."""
    shape = tiny_config()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=VOCABULARY,
            rope_theta=shape.rope_theta,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def models():
    """Transformers' model in float32 and float64, and ours in float32."""
    single = tiny_model()
    double = tiny_model().double()
    stored = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    head = stored["lm_head.weight"][YES] - stored["lm_head.weight"][NO]
    weights = fuse(
        stored,
        head,
        0.0,
        tiny_config(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_length=MAX_LENGTH,
    )
    forward = Forward(weights, tiny_config(), CpuAttention(torch.float32), row_chunk=64)
    return SimpleNamespace(single=single, double=double, forward=forward, left=stored)


@torch.inference_mode()
def one_by_one(model, trees: list[Tree]) -> np.ndarray:
    prompts = [torch.from_numpy(np.concatenate((tree.prefix, d))).long() for tree in trees for d in tree.documents]
    logits = [model(ids[None], logits_to_keep=1).logits[0, -1] for ids in prompts]
    return np.array([float(row[YES] - row[NO]) for row in logits])


def packed(runner: Runner, trees: list[Tree], *, token_budget: int) -> np.ndarray:
    found = {}
    for pack in plan_packs(trees, token_budget=token_budget):
        scores = iter(runner(pack))
        found |= {(id(branch.tree), i): next(scores) for branch in pack.branches for i in branch.indices}
    return np.array([found[id(tree), i] for tree in trees for i in range(len(tree.documents))])


def trees_of(shapes: list[tuple[int, list[int]]], *, seed: int = 0) -> list[Tree]:
    draw = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return draw.integers(0, VOCABULARY, n).astype(np.int32)

    return [Tree(ids(prefix), tuple(ids(length) for length in lengths)) for prefix, lengths in shapes]


def check_agreement(models, trees: list[Tree], *, token_budget: int, deterministic: bool = False) -> None:
    """Log-odds within 1e-5 of the recipe, or twice its own float32 error where that is larger."""
    ours = packed(Runner(models.forward, deterministic=deterministic), trees, token_budget=token_budget)
    theirs, exact = one_by_one(models.single, trees), one_by_one(models.double, trees)
    allowed = max(1e-5, 2 * np.abs(theirs - exact).max())

    assert np.abs(ours - theirs).max() <= allowed


shapes = st.lists(
    st.tuples(st.integers(0, 70), st.lists(st.integers(1, 90), min_size=1, max_size=8)), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 500), st.booleans(), st.integers(0, 9))
def test_packed_scores_equal_the_recipes(models, shapes, token_budget, deterministic, seed):
    """Whatever the prefixes, documents and budgets: also prefixes split over packs, and many queries in one."""
    check_agreement(models, trees_of(shapes, seed=seed), token_budget=token_budget, deterministic=deterministic)


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(75, [17] * 500)], id="500 documents"),
        pytest.param([(60, [7_900])], id="a document of 7,900 tokens"),
        pytest.param([(1500, [1, 600])], id="a prefix longer than what is kept"),
        pytest.param([(511, [512, 513, 1]), (0, [1024, 1025])], id="around the attention's block"),
    ],
)
def test_sizes_at_the_edge(models, shapes):
    check_agreement(models, trees_of(shapes), token_budget=2048)


def test_a_kept_prefix_is_forgotten_with_its_tree(models):
    runner = Runner(models.forward, deterministic=False)
    trees = trees_of([(20, [5] * 10)])
    packed(runner, trees, token_budget=40)
    assert len(runner._kept) == 1

    del trees
    assert len(runner._kept) == 0


def test_the_weights_are_held_once(models):
    """Everything but the output head, which is not needed, has been taken out of the checkpoint."""
    assert set(models.left) == {"lm_head.weight"}


def test_rows_of_a_layout():
    """The first branch's prefix is at hand; the second's is computed."""
    first, second = trees_of([(2, [1]), (1, [2, 1])])
    pack = Pack(tuple(branch for pack in plan_packs([first, second], token_budget=99) for branch in pack.branches))
    layout = lay_out(pack, kept={first})

    assert layout.positions.tolist() == [2, 0, 1, 2, 1]
    assert layout.last_rows.tolist() == [0, 3, 4]
    assert layout.kept == (first,)
    assert [part.prefix.kept for part in layout.documents] == [True, False, False]
