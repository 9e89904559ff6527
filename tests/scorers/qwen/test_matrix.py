"""Packed matrices against plain ones: the same products, whatever the rows and wherever they lie."""

import pytest
import torch
from torch.nn.functional import linear

from qwen_rerank.scorers.qwen.model import PackedMatrix, PlainMatrix, _packs, as_matrix

packs = pytest.mark.skipif(not _packs(torch.float32), reason="this build or CPU has no packed matrices")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(scope="module")
def weight():
    return draw(192, 64)


@packs
@torch.inference_mode()
@pytest.mark.parametrize("n_rows", [0, 1, 2, 17, 511, 512, 513, 1500])
def test_a_packed_product_is_the_plain_one(weight, n_rows):
    rows = draw(n_rows, 64)

    torch.testing.assert_close(PackedMatrix(weight)(rows), linear(rows, weight), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [PlainMatrix, pytest.param(PackedMatrix, marks=packs)])
def test_a_product_is_added_in_place_to_some_rows(weight, kind):
    """The rows are a slice of a larger tensor, as a chunk of the hidden states is; its neighbours stay as they were."""
    total, rows = draw(9, 192), draw(4, 64)
    expected = total.clone()
    expected[3:7] += linear(rows, weight)
    kind(weight).add_to(total[3:7], rows)

    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("n_rows", [1, 130, 600])
def test_the_same_rows_give_the_same_bits(weight, n_rows):
    """Deterministic mode builds on it, also when products of other shapes come between."""
    rows, made = draw(n_rows, 64), as_matrix(weight.clone())
    first = made(rows)
    for others in (3, 77, 900):
        made(draw(others, 64))

    assert torch.equal(made(rows.clone()), first)


@pytest.mark.skipif(not _packs(torch.bfloat16), reason="this build or CPU has no packed matrices in bfloat16")
@torch.inference_mode()
def test_bfloat16_is_rounded_once(weight):
    rough, rows = weight.bfloat16(), draw(40, 64, dtype=torch.bfloat16)

    torch.testing.assert_close(PackedMatrix(rough)(rows), linear(rows.float(), rough.float()).bfloat16())


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(AttributeError("no operator"), id="a version without the operators"),
        pytest.param(RuntimeError("no kernel"), id="a CPU without the kernels"),
        pytest.param(None, id="a kernel with other results"),
    ],
)
def test_without_right_kernels_the_plain_matrix_is_used(monkeypatch, weight, fault):
    class Broken:
        def __init__(self, weight):
            if fault:
                raise fault
            self._weight = weight

        def __call__(self, rows):
            return linear(rows, self._weight) + 1

    monkeypatch.setattr("qwen_rerank.scorers.qwen.model.PackedMatrix", Broken)
    monkeypatch.setattr(
        "qwen_rerank.scorers.qwen.model._packs", _packs.__wrapped__
    )  # what was seen before is remembered

    assert isinstance(as_matrix(weight), PlainMatrix)


def test_float16_and_other_devices_stay_plain(weight):
    assert isinstance(as_matrix(weight.half()), PlainMatrix)
    assert isinstance(as_matrix(weight.to("meta")), PlainMatrix)
