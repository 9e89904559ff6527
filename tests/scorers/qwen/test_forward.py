"""The packed forward pass against Transformers' own Qwen3, one prompt at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import plan_packs

from qwen_rerank.packing import Branch, Pack, Tree
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.forward import Forward
from qwen_rerank.scorers.qwen.layout import Span, lay_out
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


def check_agreement(models, trees: list[Tree], *, token_budget: int, **options: object) -> None:
    """Log-odds within 1e-5 of the recipe, or twice its own float32 error where that is larger."""
    runner = Runner(models.forward, **{"deterministic": False, **options})
    # The second time openings and unfinished prefixes are at hand.
    ours = [packed(runner, trees, token_budget=token_budget) for _ in range(2)]
    theirs, exact = one_by_one(models.single, trees), one_by_one(models.double, trees)
    allowed = max(1e-5, 2 * np.abs(theirs - exact).max())

    assert np.abs(np.array(ours) - theirs).max() <= allowed


shapes = st.lists(
    st.tuples(st.integers(0, 70), st.lists(st.integers(1, 90), min_size=1, max_size=8)), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(
    shapes,
    st.lists(st.integers(1, 70), max_size=3),
    st.sampled_from([0, 64, 512]),
    st.integers(1, 500),
    st.booleans(),
    st.integers(0, 9),
)
def test_packed_scores_equal_the_recipes(models, shapes, openings, opening_tokens, token_budget, deterministic, seed):
    """Whatever the openings, prefixes, documents and budgets: also prefixes split over packs, and many queries in one."""
    trees = trees_of(shapes, seed=seed, openings=tuple(openings))
    options = {"deterministic": deterministic, "opening_tokens": opening_tokens}
    check_agreement(models, trees, token_budget=token_budget, **options)


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
        pytest.param([(0, [63, 64, 65, 128, 129]), (64, [1, 64, 65])], id="around the small attention's block"),
        pytest.param([(511, [512, 513, 514]), (0, [1023, 1024, 1025])], id="around the ways to attend"),
        pytest.param([(150, [1100, 1536, 1537]), (600, [600, 1024, 1025])], id="around the kernel's block"),
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


def test_an_opening_is_computed_once_for_all_queries_that_begin_with_it(models, monkeypatch):
    rows, run = [], Forward.__call__

    def counting(self, layout, *args, **kwargs):
        rows.append(len(layout.ids))
        return run(self, layout, *args, **kwargs)

    monkeypatch.setattr(Forward, "__call__", counting)
    runner = Runner(models.forward, deterministic=False, opening_tokens=100)
    trees = trees_of([(5, [3, 4]), (6, [7])], openings=(50,))
    packed(runner, trees[:1], token_budget=500)
    packed(runner, trees[1:], token_budget=500)

    assert rows == [50 + 5 + 3 + 4, 6 + 7]


def test_no_more_openings_are_kept_than_allowed_and_the_one_used_last_stays(models):
    runner = Runner(models.forward, deterministic=False, opening_tokens=100)
    trees = trees_of([(5, [3])] * 4, openings=(40, 41, 42, 101))
    for tree in (trees[0], trees[1], trees[0], trees[2], trees[3]):
        packed(runner, [tree], token_budget=500)

    assert set(runner._openings) == {trees[0].opening, trees[2].opening}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 300))
def test_deterministic_scores_have_the_same_bits_whatever_openings_are_at_hand(models, order, token_budget):
    trees = trees_of([(5, [30, 8]), (9, [20]), (3, [11, 70]), (4, [15]), (8, [9])], openings=(40, 41, 60, 130))
    alone = {
        tree: packed(Runner(models.forward, deterministic=True, opening_tokens=100), [tree], token_budget=500)
        for tree in trees
    }
    runner = Runner(models.forward, deterministic=True, opening_tokens=100)
    for i in order:
        assert packed(runner, [trees[i]], token_budget=token_budget).tobytes() == alone[trees[i]].tobytes()


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
    assert [part.seen for part in layout.documents] == [(Span(0, 2, kept=True),), (Span(1, 2),), (Span(1, 2),)]


def test_rows_behind_a_head():
    """The second branch's prefix begins with an opening that is at hand; only what comes behind it is computed."""
    first, second = trees_of([(2, [1]), (1, [2])], openings=(3, 4))
    pack = Pack(tuple(Branch(tree, (0,)) for tree in (first, second)))
    layout = lay_out(pack, kept={first}, openings=[second.opening])

    assert layout.n_kept == 4 + 5
    assert layout.positions.tolist() == [5, 4, 5, 6]
    assert [part.seen for part in layout.documents] == [
        (Span(4, 9, kept=True),),
        (Span(0, 4, kept=True), Span(1, 2)),
    ]
