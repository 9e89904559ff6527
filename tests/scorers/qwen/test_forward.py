"""The packed forward pass against Transformers' own Qwen3, one prompt at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank.packing import Pack, Tree, plan_packs
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.forward import Forward
from qwen_rerank.scorers.qwen.layout import lay_out
from qwen_rerank.scorers.qwen.ops import EagerOps
from qwen_rerank.scorers.qwen.runner import Runner

from .tiny import one_by_one, packed, tiny_config, tiny_model, tiny_weights, trees_of


@pytest.fixture(scope="module")
def models():
    """Transformers' model in float32 and float64, and ours in float32."""
    single = tiny_model()
    double = tiny_model().double()
    stored = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    weights = tiny_weights(stored, dtype=torch.float32, device="cpu")
    forward = Forward(weights, tiny_config(), CpuAttention(torch.float32), EagerOps(), row_chunk=64)
    return SimpleNamespace(single=single, double=double, forward=forward, left=stored)


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


@st.composite
def wide_shapes(draw) -> list[tuple[int, list[int]]]:
    """1 to 500 documents behind a prefix of up to 2,000 tokens, with a second query; one document of up to 8,000."""
    n_documents = draw(st.integers(1, 500))
    room = max(8, 6000 // n_documents)  # what the recipe computes for each, prompt by prompt
    prefix = draw(st.integers(0, min(2000, room // 2)))
    lengths = draw(st.lists(st.integers(1, room - prefix), min_size=1, max_size=9))
    many = (prefix, [lengths[i % len(lengths)] for i in range(n_documents)])
    return [many, (draw(st.integers(0, 150)), [3, draw(st.integers(1, 8000))])]


@pytest.mark.heavy
def test_packed_scores_equal_the_recipes_at_every_size(models, full):
    """Also with more documents than a pack holds, and with prefixes and documents longer than a pack."""

    @settings(max_examples=100 if full else 3, deadline=None)
    @given(wide_shapes(), st.sampled_from([256, 2048, 8192]), st.booleans(), st.integers(0, 9))
    def check(shapes, token_budget, deterministic, seed):
        check_agreement(models, trees_of(shapes, seed=seed), token_budget=token_budget, deterministic=deterministic)

    check()


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(75, [17] * 500)], id="500 documents"),
        pytest.param([(60, [7_900])], id="a document of 7,900 tokens"),
        pytest.param([(1500, [1, 600])], id="a prefix longer than what is kept"),
        pytest.param([(511, [512, 513, 1]), (0, [1024, 1025])], id="around the attention's block"),
        pytest.param([(100, [156, 155, 157]), (150, [600, 599, 601])], id="around the ways to attend"),
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
