"""Packing: every document once, prefixes once a pack, never over the budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packs import plan_packs

from qwen_rerank.packing import Branch, Opening, Pack, Tree, Waiting, common_prefix, grow


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def tree(n_prefix: int, *lengths: int) -> Tree:
    return Tree(np.zeros(n_prefix, np.int32), tuple(np.ones(n, np.int32) for n in lengths))


trees = st.lists(
    st.builds(
        lambda prefix, lengths: tree(prefix, *lengths), st.integers(0, 40), st.lists(st.integers(1, 60), min_size=1)
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
def test_a_tree_holds_its_prompts(prompts):
    """Prefix and document together are the prompt, and every document keeps a token to read the score from."""
    grown = grow([ids(*prompt) for prompt in prompts])

    assert [[*grown.prefix, *document] for document in grown.documents] == prompts
    assert all(len(document) for document in grown.documents)


def test_a_head_is_taken_only_where_the_prompts_begin_with_it_and_go_on():
    prompts = [ids(1, 2, 3, 4), ids(1, 2, 3, 5)]
    opening = Opening(ids(1, 2))
    assert grow(prompts, opening=opening).opening is opening
    assert grow(prompts, opening=Opening(ids(1, 3))).opening is None
    assert grow(prompts, opening=Opening(ids(1, 2, 3))).opening is None


def test_a_given_cut_does_not_depend_on_the_documents():
    assert len(grow([ids(1, 2, 3, 4), ids(1, 2, 3, 5)], cut=1).prefix) == 1


@pytest.mark.parametrize(
    ("lengths", "token_budget", "packs"),
    [
        pytest.param([], 100, [], id="no trees"),
        pytest.param([(10, 40, 50)], 100, [[(1, 0)]], id="the budget is inclusive, longest first"),
        pytest.param([(10, 40, 50)], 99, [[(1,)], [(0,)]], id="a split query pays its prefix again"),
        pytest.param([(10, 500, 5)], 100, [[(0,)], [(1,)]], id="a long prompt runs alone"),
        pytest.param([(1, 9), (1, 9)], 20, [[(0,), (0,)]], id="many queries in a pack"),
    ],
)
def test_plan_packs(lengths, token_budget, packs):
    planned = plan_packs([tree(*item) for item in lengths], token_budget=token_budget)

    assert [[branch.indices for branch in pack.branches] for pack in planned] == packs


@given(trees, st.integers(1, 200))
def test_every_document_lies_in_one_pack_within_the_budget(grown, budget):
    packs = plan_packs(grown, token_budget=budget)

    places = [(id(branch.tree), i) for pack in packs for branch in pack.branches for i in branch.indices]
    assert sorted(places) == sorted((id(item), i) for item in grown for i in range(len(item.documents)))
    assert all(pack.tokens <= budget or pack.n_documents == 1 for pack in packs)


@given(trees, st.integers(1, 200))
def test_halves_hold_what_the_pack_held(grown, budget):
    for pack in plan_packs(grown, token_budget=budget):
        if pack.n_documents > 1:
            places = [[(branch.tree, i) for branch in half.branches for i in branch.indices] for half in pack.halves()]
            assert places[0] + places[1] == [(branch.tree, i) for branch in pack.branches for i in branch.indices]


def test_a_branch_says_whether_its_prefix_is_needed_again():
    waiting = Waiting(tree(2, 3, 3))

    assert waiting.tokens == 8
    assert [waiting.take(5).more, waiting.take(5).more] == [True, False]
    assert waiting.tokens == waiting.smallest_step == 0


def test_what_does_not_fit_is_left_unless_forced():
    waiting = Waiting(tree(2, 9))

    assert waiting.take(5) is None
    assert waiting.take(5, force=True).indices == (0,)


def test_a_pack_counts_a_shared_prefix_once():
    shared = tree(10, 1, 2)

    assert Pack((Branch(shared, (0, 1)),)).tokens == shared.tokens == 13
