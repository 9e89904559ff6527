"""Packing: every document once, prefixes once a batch, never over the budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_rerank.scorers.qwen.packing import (
    GroupSlice,
    PackedBatch,
    QueryGroup,
    SharedPrefix,
    Waiting,
    common_prefix,
    group_prompts,
)
from tests.batches import plan_batches


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def group(n_prefix: int, *lengths: int) -> QueryGroup:
    return QueryGroup(np.zeros(n_prefix, np.int32), tuple(np.ones(n, np.int32) for n in lengths))


groups = st.lists(
    st.builds(
        lambda prefix, lengths: group(prefix, *lengths), st.integers(0, 40), st.lists(st.integers(1, 60), min_size=1)
    ),
    max_size=5,
)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        pytest.param([[1, 2, 3], [1, 2, 4]], 2, id="up to the first difference"),
        pytest.param([[1, 2, 3], [1, 2, 3]], 2, id="equal prompts keep one token each"),
        pytest.param([[1, 2], [1, 2, 3]], 1, id="the shortest prompt keeps a token"),
        pytest.param([[1, 2, 3]], 2, id="one prompt"),
        pytest.param([[1], [1, 2]], 0, id="nothing to share"),
        pytest.param([[5, 2], [6, 2]], 0, id="different from the start"),
    ],
)
def test_common_prefix(prompts, expected):
    assert common_prefix([ids(*prompt) for prompt in prompts]) == expected


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6))
def test_a_group_holds_its_prompts(prompts):
    """Prefix and document together are the prompt, and every document keeps a token to read the score from."""
    groups = group_prompts([ids(*prompt) for prompt in prompts])

    assert [[*groups.prefix, *document] for document in groups.documents] == prompts
    assert all(len(document) for document in groups.documents)


def test_a_head_is_taken_only_where_the_prompts_begin_with_it_and_go_on():
    prompts = [ids(1, 2, 3, 4), ids(1, 2, 3, 5)]
    shared_prefix = SharedPrefix(ids(1, 2))
    assert group_prompts(prompts, shared_prefix=shared_prefix).shared_prefix is shared_prefix
    assert group_prompts(prompts, shared_prefix=SharedPrefix(ids(1, 3))).shared_prefix is None
    assert group_prompts(prompts, shared_prefix=SharedPrefix(ids(1, 2, 3))).shared_prefix is None


def test_a_given_cut_does_not_depend_on_the_documents():
    assert len(group_prompts([ids(1, 2, 3, 4), ids(1, 2, 3, 5)], cut=1).prefix) == 1


@pytest.mark.parametrize(
    ("lengths", "token_budget", "batches"),
    [
        pytest.param([], 100, [], id="no groups"),
        pytest.param([(10, 40, 50)], 100, [[(1, 0)]], id="the budget is inclusive, longest first"),
        pytest.param([(10, 40, 50)], 99, [[(1,)], [(0,)]], id="a split query pays its prefix again"),
        pytest.param([(10, 500, 5)], 100, [[(0,)], [(1,)]], id="a long prompt runs alone"),
        pytest.param([(1, 9), (1, 9)], 20, [[(0,), (0,)]], id="many queries in a batch"),
    ],
)
def test_plan_packs(lengths, token_budget, batches):
    planned = plan_batches([group(*item) for item in lengths], token_budget=token_budget)

    assert [[group_slice.indices for group_slice in batch.slices] for batch in planned] == batches


@given(groups, st.integers(1, 200))
def test_every_document_lies_in_one_batch_within_the_budget(groups, budget):
    batches = plan_batches(groups, token_budget=budget)

    places = [
        (id(group_slice.group), i) for batch in batches for group_slice in batch.slices for i in group_slice.indices
    ]
    assert sorted(places) == sorted((id(item), i) for item in groups for i in range(len(item.documents)))
    assert all(batch.tokens <= budget or batch.n_documents == 1 for batch in batches)


@given(groups, st.integers(1, 200))
def test_halves_hold_what_the_batch_held(groups, budget):
    for batch in plan_batches(groups, token_budget=budget):
        if batch.n_documents > 1:
            places = [
                [(group_slice.group, i) for group_slice in half.slices for i in group_slice.indices]
                for half in batch.halves()
            ]
            assert places[0] + places[1] == [
                (group_slice.group, i) for group_slice in batch.slices for i in group_slice.indices
            ]


def test_a_slice_says_whether_its_prefix_is_needed_again():
    waiting = Waiting(group(2, 3, 3))

    assert waiting.tokens == 8
    assert [waiting.take(5).more, waiting.take(5).more] == [True, False]
    assert waiting.tokens == waiting.smallest_step == 0


def test_what_does_not_fit_is_left_unless_forced():
    waiting = Waiting(group(2, 9))

    assert waiting.take(5) is None
    assert waiting.take(5, force=True).indices == (0,)


def test_a_batch_counts_a_shared_prefix_once():
    shared = group(10, 1, 2)

    assert PackedBatch((GroupSlice(shared, (0, 1)),)).tokens == shared.tokens == 13
