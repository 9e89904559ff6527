"""8-bit products against their own slow reference, and the trial that says which matrices bear them."""

import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from qwen_rerank import QwenScorer
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.scorers.qwen.kernels import cpu_ops
from qwen_rerank.scorers.qwen.quantization import (
    MAX_ERROR,
    GroupedInt8Matrix,
    Int8Matrix,
    Quantization,
    Trial,
    check_int8,
    int8_works,
)

TEXTS = ["Beijing is the capital of China.", "北京是中华人民共和国的首都。" * 6, "", "no " * 300]

OPS = cpu_ops(torch.bfloat16)

works = pytest.mark.skipif(not int8_works(), reason="this build or CPU has no exact 8-bit products")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def slow_product(rows: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """Return the product in int64, one row and one column at a time, each with a scale of its own, as float64."""
    small = np.float32(1e-30)
    out = np.zeros((len(rows), len(weight)))
    for j, column in enumerate(weight.float().numpy()):
        column_scale = max(np.abs(column).max() / np.float32(127), small)
        column_levels = np.round(column / column_scale).astype(np.int64)
        for i, row in enumerate(rows.float().numpy()):
            raised = max(np.abs(row).max() * np.float32((1 + 2**-8) / 127), small)
            scale = np.float32(torch.tensor(raised).bfloat16().item())
            levels = np.round(row * (np.float32(1) / scale)).astype(np.int64)
            assert np.abs(levels).max() <= 127
            out[i, j] = float(levels @ column_levels) * float(column_scale) * float(scale)
    return out


@works
@torch.inference_mode()
@pytest.mark.parametrize("n_rows", [0, 1, 7, 40])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_an_int8_product_is_the_slow_one(n_rows, dtype, allowed):
    """Of rows of unlike sizes, one of them zeros, and of a weight with a row of zeros."""
    weight, rows = draw(24, 72).to(dtype), (draw(n_rows, 72) * (1 + torch.arange(n_rows)[:, None] ** 3)).to(dtype)
    weight[3], rows[:1] = 0, 0

    found = Int8Matrix(weight, OPS)(rows)

    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), slow_product(rows, weight), rtol=allowed)


@works
@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_a_product_in_groups_is_the_sum_of_the_slow_ones(dtype, allowed):
    weight, rows = draw(5, 1536).to(dtype), draw(6, 1536).to(dtype)
    weight[3, :512], rows[:2, 512:1024] = 0, 0
    groups = [slice(start, start + 512) for start in (0, 512, 1024)]

    found = GroupedInt8Matrix(weight, OPS)(rows)

    assert found.dtype == dtype
    expected = sum(slow_product(rows[:, group], weight[:, group]) for group in groups)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=allowed, atol=1e-4)


@works
@torch.inference_mode()
@pytest.mark.parametrize(("kind", "size"), [(Int8Matrix, 72), (GroupedInt8Matrix, 1024)])
def test_an_int8_product_is_added_in_place_to_some_rows(kind, size):
    total, rows, matrix = draw(9, 24), draw(4, size), kind(draw(24, size), OPS)
    expected = total.clone()
    expected[3:7] += matrix(rows)
    matrix.add_to(total[3:7], rows)

    torch.testing.assert_close(total, expected)


@works
@torch.inference_mode()
@pytest.mark.parametrize(("kind", "size"), [(Int8Matrix, 64), (GroupedInt8Matrix, 1024)])
@pytest.mark.parametrize("n_rows", [0, 1, 130])
def test_the_same_row_gives_the_same_bits_whatever_lies_beside_it(n_rows, kind, size):
    matrix, rows = kind(draw(192, size), OPS), draw(600, size)

    assert torch.equal(matrix(rows)[:n_rows], matrix(rows[:n_rows]))


@works
@torch.inference_mode()
@pytest.mark.parametrize(("kind", "size"), [(Int8Matrix, 64), (GroupedInt8Matrix, 1024)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_stays_none_and_disturbs_no_other(value, kind, size):
    rows, matrix = draw(3, size), kind(draw(32, size), OPS)
    expected = matrix(rows)
    rows[1, 5] = value
    found = matrix(rows)

    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@works
@torch.inference_mode()
@pytest.mark.parametrize(("outlier", "stays"), [(1.0, False), (300.0, True)])
def test_a_matrix_with_outlier_channels_stays_exact(outlier, stays):
    """One large channel takes all levels, and what the others say is lost where the weight makes little of the large one."""
    rows, weight = draw(50, 128), draw(64, 128)
    rows[:, 9] *= outlier
    weight[:, 9] /= outlier
    trial = Trial("down", weight, ops=OPS)

    torch.testing.assert_close(trial(rows), rows @ weight.T, rtol=1e-4, atol=1e-4)
    assert (trial.error > MAX_ERROR) == stays
    assert isinstance(trial.chosen, Int8Matrix) != stays


@works
@torch.inference_mode()
def test_a_matrix_behind_a_gate_gets_a_scale_for_every_group_of_columns():
    """`silu(gate) * up` is large here and there: one scale a row is too coarse, one a group is not."""
    rows, weight = silu(draw(50, 3072)) * draw(51, 3072)[:50], draw(64, 3072)
    trial, coarse = Trial("down", weight, ops=OPS), Int8Matrix(weight, OPS)
    exact = trial(rows)

    error = (coarse(rows) - exact).norm(dim=1) / exact.norm(dim=1)
    assert trial.error <= MAX_ERROR < error.mean()
    assert isinstance(trial.chosen, GroupedInt8Matrix)


@pytest.fixture(scope="module")
def with_outliers(small, tmp_path_factory):
    """A checkpoint whose first MLP reads one channel that is 2,000 times as large as the others, and hardly uses it."""
    folder = tmp_path_factory.mktemp("outliers") / "model"
    shutil.copytree(small, folder)
    stored = load_file(folder / "model.safetensors")
    at = "model.layers.0."
    stored[at + "post_attention_layernorm.weight"][3] = 2000
    for name in ("gate_proj", "up_proj"):
        stored[f"{at}mlp.{name}.weight"][:, 3] /= 2000
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@works
def test_planted_outliers_stay_exact_and_are_reported(with_outliers, caplog):
    with (
        caplog.at_level(logging.INFO),
        QwenScorer(str(with_outliers), device="cpu", quantize="int8", max_length=512) as small,
        QwenScorer(str(with_outliers), device="cpu", max_length=512) as exact,
    ):
        difference = np.abs(small.score("首都", TEXTS) - exact.score("首都", TEXTS)).max()

    assert "layers.0.gate_up" in small.quantization.exact
    assert 0 < small.quantization.exact_share < 0.5
    assert max(error for name, error in small.quantization.errors.items() if name not in small.quantization.exact) <= (
        MAX_ERROR
    )
    assert "layers.0.gate_up" in caplog.text
    assert 0 < difference < 0.5


@works
@torch.inference_mode()
def test_rows_that_lie_apart_in_memory_are_multiplied_as_those_that_do_not():
    wide = draw(7, 2048)
    for matrix, rows in (
        (Int8Matrix(draw(24, 72), OPS), wide[:, :72]),
        (GroupedInt8Matrix(draw(24, 1024), OPS), wide[:, :1024]),
    ):
        assert torch.equal(matrix(rows), matrix(rows.contiguous()))


@works
@torch.inference_mode()
def test_a_width_that_is_no_multiple_of_a_group_has_one_scale_a_row_or_none():
    rows, weight = silu(draw(50, 600)) * draw(51, 600)[:50], draw(64, 600)
    rows[:, 9] *= 300
    weight[:, 9] /= 300
    trial = Trial("down", weight, ops=OPS)
    trial(rows)

    assert not isinstance(trial.chosen, Int8Matrix | GroupedInt8Matrix)


def test_which_matrices_have_groups_is_reported_and_told_apart():
    one, other = (
        Quantization(errors={}, grouped=names, exact=(), exact_share=0.0) for names in ((), ("layers.0.down",))
    )

    assert one.fingerprint != other.fingerprint
    assert (
        other.fingerprint != Quantization(errors={}, grouped=(), exact=("layers.0.down",), exact_share=0.2).fingerprint
    )


@works
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_scores_are_deterministic_and_close(small, dtype):
    """The same choice and bits from two scorers, also in other company; a fingerprint of their own."""
    options = {"device": "cpu", "dtype": dtype, "max_length": 512, "deterministic": True}
    made = [QwenScorer(str(small), quantize=each, **options) for each in ("int8", "int8", None)]
    one, other, exact = (scorer.score("首都", TEXTS) for scorer in made)
    alone = [float(made[0].score("首都", [text])[0]) for text in TEXTS]
    for scorer in made:
        scorer.close()

    assert one.tolist() == other.tolist() == alone
    assert 0 < np.abs(one - exact).max() < 0.5
    assert made[0].quantization == made[1].quantization
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    assert made[2].quantization is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize must be one of 'int8', not 'int4'"),
        ({"quantize": "int8", "dtype": "float16"}, "goes with dtype='float32' or 'bfloat16'"),
        ({"threads": 0}, "threads"),
    ],
)
def test_wrong_formats_are_refused(small, options, message):
    with pytest.raises(InvalidInputError, match=message):
        QwenScorer(str(small), device="cpu", max_length=512, **options)


def test_another_device_and_a_cpu_without_exact_products_are_refused(monkeypatch):
    with pytest.raises(InvalidInputError, match="is for the CPU, not for cuda"):
        check_int8(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr("qwen_rerank.scorers.qwen.quantization.int8_works", lambda: False)
    with pytest.raises(InvalidInputError, match="needs exact 8-bit products"):
        check_int8(torch.device("cpu"), torch.float32)


def test_products_that_overflow_are_noticed(monkeypatch):
    """As kernels that add in 16 bits give them."""
    broken = type(
        "Broken", (Int8Matrix,), {"__call__": lambda self, rows: Int8Matrix.__call__(self, rows).clamp_(max=9)}
    )
    monkeypatch.setattr("qwen_rerank.scorers.qwen.quantization.Int8Matrix", broken)

    assert not int8_works.__wrapped__()


def test_a_forward_pass_takes_the_threads_that_were_asked_for(small, monkeypatch):
    before, seen = torch.get_num_threads(), []
    try:
        with QwenScorer(str(small), device="cpu", max_length=512, threads=3) as scorer:
            forward = scorer._scheduler._run._forward
            monkeypatch.setattr(
                type(forward), "__call__", lambda *_, **__: seen.append(torch.get_num_threads()) or 1 / 0
            )
            scorer.score_details("q", ["a"])
    finally:
        torch.set_num_threads(before)

    assert seen == [3]
