"""The packed forward pass against Transformers' own Qwen3, one prompt at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.engine import Runner
from qwen_rerank.scorers.qwen.kernels import EagerOps
from qwen_rerank.scorers.qwen.model import Forward
from qwen_rerank.scorers.qwen.packing import GroupSlice, PackedBatch, QueryGroup, RowSpan, lay_out
from tests.batches import plan_batches
from tests.scorers.qwen.tiny import groups_of, one_by_one, packed, tiny_config, tiny_model, tiny_weights


@pytest.fixture(scope="module")
def models():
    """Transformers' model in float32 and float64, and ours in float32."""
    single = tiny_model()
    double = tiny_model().double()
    stored = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    weights = tiny_weights(stored, dtype=torch.float32, device="cpu")
    forward = Forward(weights, tiny_config(), CpuAttention(torch.float32, EagerOps()), EagerOps(), row_chunk=64)
    return SimpleNamespace(single=single, double=double, forward=forward, left=stored)


def check_agreement(models, groups: list[QueryGroup], *, token_budget: int, **options: object) -> None:
    """Log-odds within 1e-5 of the recipe, or twice its own float32 error where that is larger."""
    runner = Runner(models.forward, **{"deterministic": False, **options})
    # The second time shared prefixes and unfinished prefixes are at hand.
    ours = [packed(runner, groups, token_budget=token_budget) for _ in range(2)]
    theirs, exact = one_by_one(models.single, groups), one_by_one(models.double, groups)
    allowed = max(1e-5, 2 * np.abs(theirs - exact).max())

    assert np.abs(np.array(ours) - theirs).max() <= allowed


shapes = st.lists(
    st.tuples(st.integers(0, 70), st.lists(st.integers(1, 90), min_size=1, max_size=8)), min_size=1, max_size=3
)


def test_packed_scores_equal_the_recipes(models, full):
    """Whatever the shared prefixes, prefixes, documents and budgets: also prefixes split over batches, and many queries in one."""

    @settings(max_examples=200 if full else 20)
    @given(
        shapes,
        st.lists(st.integers(1, 70), max_size=3),
        st.sampled_from([0, 64, 512]),
        st.integers(1, 500),
        st.booleans(),
        st.integers(0, 9),
    )
    def check(shapes, shared_prefixes, shared_prefix_tokens, token_budget, deterministic, seed):
        groups = groups_of(shapes, seed=seed, shared_prefixes=tuple(shared_prefixes))
        options = {"deterministic": deterministic, "shared_prefix_tokens": shared_prefix_tokens}
        check_agreement(models, groups, token_budget=token_budget, **options)

    check()


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
    """Also with more documents than a batch holds, and with prefixes and documents longer than a batch."""

    @settings(max_examples=100 if full else 2)
    @given(wide_shapes(), st.sampled_from([256, 2048, 8192]), st.booleans(), st.integers(0, 9))
    def check(shapes, token_budget, deterministic, seed):
        check_agreement(models, groups_of(shapes, seed=seed), token_budget=token_budget, deterministic=deterministic)

    check()


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(75, [17] * 200)], id="200 documents"),
        pytest.param([(60, [4_300])], id="a document of 4,300 tokens"),
        pytest.param([(1500, [1, 600])], id="a prefix longer than what is kept"),
        pytest.param([(0, [63, 64, 65, 128, 129]), (64, [1, 64, 65])], id="around the small attention's block"),
        pytest.param([(511, [512, 513, 514]), (0, [1023, 1024, 1025])], id="around the ways to attend"),
        pytest.param([(150, [1100, 1536, 1537]), (600, [600, 1024, 1025])], id="around the kernel's block"),
    ],
)
def test_sizes_at_the_edge(models, shapes):
    check_agreement(models, groups_of(shapes), token_budget=2048)


def test_a_kept_prefix_is_forgotten_with_its_group(models):
    runner = Runner(models.forward, deterministic=False)
    groups = groups_of([(20, [5] * 10)])
    packed(runner, groups, token_budget=40)
    assert len(runner._prefix_kv) == 1

    del groups
    assert len(runner._prefix_kv) == 0


def test_an_opening_is_computed_once_for_all_queries_that_begin_with_it(models, monkeypatch):
    rows, run = [], Forward.__call__

    def counting(self, layout, *args, **kwargs):
        rows.append(len(layout.ids))
        return run(self, layout, *args, **kwargs)

    monkeypatch.setattr(Forward, "__call__", counting)
    runner = Runner(models.forward, deterministic=False, shared_prefix_tokens=100)
    groups = groups_of([(5, [3, 4]), (6, [7])], shared_prefixes=(50,))
    packed(runner, groups[:1], token_budget=500)
    packed(runner, groups[1:], token_budget=500)

    assert rows == [50 + 5 + 3 + 4, 6 + 7]


def test_no_more_openings_are_kept_than_allowed_and_the_one_used_last_stays(models):
    runner = Runner(models.forward, deterministic=False, shared_prefix_tokens=100)
    groups = groups_of([(5, [3])] * 4, shared_prefixes=(40, 41, 42, 101))
    for group in (groups[0], groups[1], groups[0], groups[2], groups[3]):
        packed(runner, [group], token_budget=500)

    assert set(runner._shared_kv) == {groups[0].shared_prefix, groups[2].shared_prefix}


@settings(max_examples=20)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 300))
def test_deterministic_scores_have_the_same_bits_whatever_openings_are_at_hand(models, order, token_budget):
    groups = groups_of([(5, [30, 8]), (9, [20]), (3, [11, 70]), (4, [15]), (8, [9])], shared_prefixes=(40, 41, 60, 130))
    alone = {
        group: packed(Runner(models.forward, deterministic=True, shared_prefix_tokens=100), [group], token_budget=500)
        for group in groups
    }
    runner = Runner(models.forward, deterministic=True, shared_prefix_tokens=100)
    for i in order:
        assert packed(runner, [groups[i]], token_budget=token_budget).tobytes() == alone[groups[i]].tobytes()


def test_the_weights_are_held_once(models):
    """Everything but the output head, which is not needed, has been taken out of the checkpoint."""
    assert set(models.left) == {"lm_head.weight"}


def test_rows_of_a_layout():
    """The first slice's prefix is at hand; the second's is computed."""
    first, second = groups_of([(2, [1]), (1, [2, 1])])
    batch = PackedBatch(
        tuple(group_slice for batch in plan_batches([first, second], token_budget=99) for group_slice in batch.slices)
    )
    layout = lay_out(batch, past_groups={first})

    assert layout.positions.tolist() == [2, 0, 1, 2, 1]
    assert layout.last_rows.tolist() == [0, 3, 4]
    assert layout.past_groups == (first,)
    assert [segment.seen for segment in layout.documents] == [
        (RowSpan(0, 2, past=True),),
        (RowSpan(1, 2),),
        (RowSpan(1, 2),),
    ]


def test_rows_behind_a_head():
    """The second slice's prefix begins with a shared prefix that is at hand; only what comes behind it is computed."""
    first, second = groups_of([(2, [1]), (1, [2])], shared_prefixes=(3, 4))
    batch = PackedBatch(tuple(GroupSlice(group, (0,)) for group in (first, second)))
    layout = lay_out(batch, past_groups={first}, shared_prefixes=[second.shared_prefix])

    assert layout.n_past == 4 + 5
    assert layout.positions.tolist() == [5, 4, 5, 6]
    assert [segment.seen for segment in layout.documents] == [
        (RowSpan(4, 9, past=True),),
        (RowSpan(0, 4, past=True), RowSpan(1, 2)),
    ]
