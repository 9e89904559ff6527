"""Shares of a batch: every document once, about equally long, and scored as in one share."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.device import Crew
from qwen_rerank.scorers.qwen.engine import Runner
from qwen_rerank.scorers.qwen.kernels import cpu_ops
from qwen_rerank.scorers.qwen.model import Forward, exact_matrix, fuse
from qwen_rerank.scorers.qwen.packing import GroupSlice, PackedBatch
from qwen_rerank.scorers.qwen.quantization import Int8Matrix, int8_works
from qwen_rerank.scorers.qwen.shares import share_out
from tests.scorers.qwen.tiny import MAX_LENGTH, NO, YES, groups_of, packed, tiny_config, tiny_model

FORMATS = {
    "float32": (torch.float32, exact_matrix, 1e-5),
    "bfloat16": (torch.bfloat16, exact_matrix, 0.05),
    "int8": (torch.bfloat16, lambda _, weight: Int8Matrix(weight, cpu_ops(torch.bfloat16)), 0.05),
}
shapes = st.lists(
    st.tuples(st.integers(0, 200), st.lists(st.integers(1, 250), min_size=1, max_size=6)), min_size=1, max_size=3
)


@pytest.fixture(autouse=True)
def threads():
    """The number of threads as it was, which a runner sets for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def whole_batch(shapes: list[tuple[int, list[int]]]) -> PackedBatch:
    return PackedBatch(tuple(GroupSlice(group, tuple(range(len(group.documents)))) for group in groups_of(shapes)))


@given(shapes, st.integers(1, 9), st.sampled_from([0, 400, 10_000]))
def test_every_document_lies_in_one_share_at_its_place(shapes, n_threads, room):
    batch = whole_batch(shapes)
    steps = share_out(batch, n_threads, n_new=lambda group: len(group.prefix), room=room)
    found = {}
    for step in steps:
        assert 1 <= len(step) <= n_threads
        for share in step:
            documents = [(part.group, i) for part in share.batch.slices for i in part.indices]
            found |= dict(zip(share.places, documents, strict=True))

    assert sum(share.batch.n_documents for step in steps for share in step) == batch.n_documents
    assert [found[i] for i in sorted(found)] == [(part.group, i) for part in batch.slices for i in part.indices]


@pytest.mark.parametrize(
    ("shapes", "n_threads", "expected"),
    [
        pytest.param([(15, [137] * 16)], 2, [[8, 8]], id="equal documents"),
        pytest.param([(15, [137] * 16)], 1, [[16]], id="one thread"),
        pytest.param([(15, [2000])], 2, [[1]], id="one document"),
        pytest.param([(15, [20] * 8)], 2, [[8]], id="too few rows for two"),
        pytest.param([(15, [500] * 4)], 8, [[1, 1, 1, 1]], id="two threads for each share"),
        pytest.param([(15, [2000] * 3)], 2, [[1], [1, 1]], id="three long documents: one with both threads"),
        pytest.param([(15, [400, 300, 300, 200, 100, 100])], 2, [[3, 3]], id="uneven documents, even shares"),
        pytest.param([(300, [137] * 16)], 2, [[0], [8, 8]], id="a long query is computed once, before the shares"),
        pytest.param([(4000, [137] * 4)], 2, [[4]], id="a query too long to keep is not computed twice"),
    ],
)
def test_share_out(shapes, n_threads, expected):
    steps = share_out(whole_batch(shapes), n_threads, n_new=lambda group: len(group.prefix), room=1024)

    assert [[share.batch.n_documents for share in step] for step in steps] == expected


@pytest.fixture(scope="module", params=FORMATS)
def forward_of_format(request):
    """The forward pass in a format, and how far rounding may take its scores."""
    if request.param == "int8" and not int8_works():
        pytest.skip("no exact 8-bit products on this CPU")
    dtype, make_matrix, allowed = FORMATS[request.param]
    stored = dict(tiny_model().state_dict())
    head = stored["lm_head.weight"][YES] - stored["lm_head.weight"][NO]
    place = {"dtype": dtype, "device": torch.device("cpu"), "max_length": MAX_LENGTH}
    weights = fuse(stored, head, tiny_config(), **place, make_matrix=make_matrix)
    ops = cpu_ops(dtype)
    return Forward(weights, tiny_config(), CpuAttention(dtype, ops), ops, row_chunk=64), allowed


@pytest.mark.parametrize(
    ("shapes", "shared_prefixes", "token_budget"),
    [
        pytest.param([(15, [137, 130, 90, 60, 40])], (), 3000, id="one query"),
        pytest.param([(15, [200, 30]), (0, [180, 40]), (9, [130])], (50, 40), 3000, id="three queries"),
        pytest.param([(150, [100] * 6)], (20,), 600, id="a prefix of its own, kept from batch to batch"),
    ],
)
def test_shares_score_as_one_share_does(forward_of_format, shapes, shared_prefixes, token_budget):
    """The second time shared prefixes are at hand."""
    forward, allowed = forward_of_format
    groups = groups_of(shapes, shared_prefixes=shared_prefixes)
    alone = packed(Runner(forward, deterministic=False, threads=1), groups, token_budget=token_budget)
    runner = Runner(forward, deterministic=False, shared_prefix_tokens=100, threads=2)
    for _ in range(2):
        np.testing.assert_allclose(packed(runner, groups, token_budget=token_budget), alone, atol=allowed)


def test_a_share_may_drop_the_shared_prefix_behind_which_another_computes(forward_of_format):
    """There is room for one of the two: the second query's new one puts out the first's, which is at hand."""
    forward, allowed = forward_of_format
    first, other, again = groups_of([(9, [5]), (9, [500]), (9, [400, 400])], shared_prefixes=(300, 310))
    batch = PackedBatch((GroupSlice(other, (0,)), GroupSlice(again, (0, 1), more=True)))
    alone, runner = (
        Runner(forward, deterministic=False, shared_prefix_tokens=tokens, threads=n) for tokens, n in ((0, 1), (512, 2))
    )
    runner(PackedBatch((GroupSlice(first, (0,)),)))

    np.testing.assert_allclose(runner(batch), alone(batch), atol=allowed)


@settings(max_examples=5)
@given(shapes, st.integers(2, 4))
def test_deterministic_scores_have_the_same_bits_with_any_number_of_threads(forward_of_format, shapes, n_threads):
    groups = groups_of(shapes)
    one, many = (Runner(forward_of_format[0], deterministic=True, threads=n) for n in (1, n_threads))

    assert packed(many, groups, token_budget=3000).tobytes() == packed(one, groups, token_budget=3000).tobytes()


def test_shares_run_at_once_with_the_threads_divided_among_them():
    torch.set_num_threads(5)
    meeting = threading.Barrier(2, timeout=30)

    assert Crew().run([lambda: (meeting.wait(), torch.get_num_threads())[1]] * 2, threads_each=2) == [2, 2]
    assert torch.get_num_threads() == 5
    assert Crew().run([torch.get_num_threads], threads_each=5) == [5]


def test_the_first_error_is_raised_when_all_shares_have_ended():
    torch.set_num_threads(2)
    begun, ended = threading.Event(), []

    def fail():
        begun.set()
        raise MemoryError

    def work():
        begun.wait(30)
        ended.append(1)

    with pytest.raises(MemoryError):
        Crew().run([fail, work], threads_each=1)
    assert ended == [1]


def number_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_begun_meanwhile_or_later_has_the_processs_number_of_threads():
    torch.set_num_threads(4)

    assert Crew().run([lambda: (number_of_a_new_thread(), torch.get_num_threads())] * 2, threads_each=1) == [(4, 1)] * 2
    assert number_of_a_new_thread() == 4


@pytest.mark.parametrize("n_begun", [0, 1])
def test_without_threads_every_work_is_done_once_with_as_many_threads(monkeypatch, n_begun):
    torch.set_num_threads(3)
    begin, begun, done = threading.Thread.start, [], []

    def start(self):
        if len(begun) == n_begun:
            raise RuntimeError("can't start new thread")
        begun.append(self)
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", start)

    assert Crew().run([lambda: (done.append(1), torch.get_num_threads())[1]] * 3, threads_each=1) == [1, 1, 1]
    assert (len(done), torch.get_num_threads()) == (3, 3)


def test_an_error_of_a_work_is_no_lack_of_threads():
    torch.set_num_threads(2)
    done = []

    def fail():
        done.append(1)
        raise RuntimeError("no product of these shapes")

    with pytest.raises(RuntimeError, match="no product"):
        Crew().run([fail, list], threads_each=1)
    assert done == [1]
