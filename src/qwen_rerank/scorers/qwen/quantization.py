"""8-bit products: a scale for every row of a matrix and of what it multiplies, or for 512 columns of them; the trial that chooses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn.functional import linear

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.qwen.kernels import LEVELS, TINY, ZERO_POINT, EagerOps
from qwen_rerank.scorers.qwen.model import Layer, Matrix, Weights, as_matrix
from qwen_rerank.scorers.qwen.packing import QueryGroup, group_prompts

Quantize = Literal["int8"]

MAX_ERROR = 0.02  # of a matrix's product: mean over the trial's rows of |int8 - exact| / |exact|
_GROUP_SIZE = 512  # columns with a scale of their own, where one for the whole row is too coarse

_TRIAL_QUERY = "What is the capital of China?"
_TRIAL_TEXTS = (
    "The capital of China is Beijing.",
    "北京是中华人民共和国的首都，也是全国的政治中心和文化中心。",
    "def capital(country):\n    return TABLE[country]  # raises KeyError\n",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects.",
    "Order 4471-B: 12 pcs., EUR 1,299.90, shipped 2024-03-07; https://example.org/track?id=88&lang=en",
    "Die Hauptstadt von Frankreich ist Paris; la capitale de l'Italie est Rome.",
    "| id | name | score |\n|---|---|---|\n| 1 | Peking | 0.97 |",
    "🐼 No.",
)


class Int8Matrix:
    """A matrix in int8, each output row with a scale of its own; rows are quantized as they come.

    Args:
        weight: `(out, in)`; not kept.
        ops: What quantizes rows.
    """

    def __init__(self, weight: torch.Tensor, ops: EagerOps) -> None:
        self._ops = ops
        exact = weight.float()
        self._scale = (exact.abs().amax(dim=1) / LEVELS).clamp_min_(TINY)  # (out,)
        levels = (exact / self._scale[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(levels, None)
        self._zero_points = torch.zeros(len(levels), dtype=torch.int32)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        levels, scale = self._ops.quantize(rows)
        return self.product(levels, rows.dtype).mul_(scale)

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows to `total`, in place."""
        levels, scale = self._ops.quantize(rows)
        total.addcmul_(self.product(levels, rows.dtype), scale)

    def product(self, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the integer product times the weight's scales; only the rows' scales are missing."""
        if not len(levels):
            return torch.zeros(0, len(self._scale), dtype=dtype)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            levels,
            1.0,
            ZERO_POINT,
            self._weight,
            self._scale,
            self._zero_points,
            None,
            1.0,
            0,
            dtype,
            "none",
            [],
            "",
        )
        return product


class GroupedInt8Matrix:
    """A matrix in int8 with a scale for every group of 512 columns, in its rows as in those it multiplies.

    What leaves a gate has a few large numbers among many small ones; so they make the levels coarse in their group alone.

    Args:
        weight: `(out, in)`, `in` a multiple of 512; not kept.
        ops: What quantizes rows.
    """

    def __init__(self, weight: torch.Tensor, ops: EagerOps) -> None:
        self._ops = ops
        starts = range(0, weight.shape[1], _GROUP_SIZE)
        self._groups = [Int8Matrix(weight[:, start : start + _GROUP_SIZE], ops) for start in starts]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        return self._sum(rows).to(rows.dtype)

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows to `total`, in place."""
        total.add_(self._sum(rows))

    def _sum(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the groups' products, each with its scale, added in float32."""
        shape = len(rows), len(self._groups), _GROUP_SIZE
        levels, scale = self._ops.quantize(rows.reshape(-1, _GROUP_SIZE))
        levels, scale = levels.view(shape), scale.float().view(*shape[:2], 1)
        products = (group.product(levels[:, i], torch.float32) for i, group in enumerate(self._groups))
        total = next(products).mul_(scale[:, 0])
        for i, product in enumerate(products, 1):
            total.addcmul_(product, scale[:, i])
        return total


@functools.cache
def int8_works() -> bool:
    """Whether this build and CPU multiply 8-bit integers exactly, also near the ends of their range, and round as asked for.

    Without VNNI some kernels add in 16 bits, which overflow.
    """
    kinds: list[tuple[type[Int8Matrix | GroupedInt8Matrix], int]] = [
        (Int8Matrix, 96),
        (GroupedInt8Matrix, 2 * _GROUP_SIZE),
    ]
    try:
        return all(
            _exact(kind, size, dtype, allowed)
            for kind, size in kinds
            for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7))
        )
    except (AttributeError, RuntimeError, NotImplementedError):  # private operators: another version may lack them
        return False


def _exact(kind: type[Int8Matrix | GroupedInt8Matrix], size: int, dtype: torch.dtype, allowed: float) -> bool:
    """Return whether integers come out as float64 has them, up to the rounding of `dtype`."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (48, size), generator=draw).float() * LEVELS
    rows = torch.randint(-1, 2, (19, size), generator=draw).to(dtype)
    rows[:2], weight[:2] = 1.0, LEVELS  # the largest sum
    ops = EagerOps()
    levels, scale = ops.quantize(rows)
    exact = (levels.double() - ZERO_POINT) @ weight.double().T * scale
    return torch.allclose(kind(weight, ops)(rows).double(), exact, rtol=allowed, atol=1e-3)


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse where 8-bit products are not to be had.

    Raises:
        InvalidInputError: On another device than the CPU, in float16, or without exact kernels.
    """
    if device.type != "cpu":
        raise InvalidInputError(f"quantize='int8' is for the CPU, not for {device}; leave it out, or use device='cpu'.")
    if dtype == torch.float16:
        raise InvalidInputError("quantize='int8' goes with dtype='float32' or 'bfloat16', not 'float16'.")
    if not int8_works():
        raise InvalidInputError(
            f"quantize='int8' needs exact 8-bit products, which PyTorch {torch.__version__} does not have on this CPU "
            "(on x86 they need AVX512-VNNI); leave it out."
        )


@dataclass(frozen=True, slots=True)
class Quantization:
    """The matrices that are in 8 bits, and those that are not.

    Attributes:
        errors: Name of every matrix to the error of its 8-bit product on the trial's prompts: mean over the rows of
            |int8 - exact| / |exact|. Of the kind that was chosen; of the finest where neither was.
        grouped: Names of those with a scale for every 512 columns, since one for the whole row was not good enough.
        exact: Names of those whose error is above `MAX_ERROR` either way; they stay in `dtype`.
        exact_share: Share of the weights that stay in `dtype`, embedding aside.
    """

    errors: Mapping[str, float]
    grouped: tuple[str, ...]
    exact: tuple[str, ...]
    exact_share: float

    @property
    def fingerprint(self) -> str:
        """The format as a part of a scorer's fingerprint: replicas that chose otherwise score otherwise."""
        return f"int8/{','.join(self.grouped)}/{','.join(self.exact)}"


class Trial:
    """Multiplies exactly, once, and chooses by what these rows show.

    Args:
        name: Of the matrix, for the report.
        weight: `(out, in)`; let go when the choice is made.
        ops: What quantizes the rows of the matrix that is chosen.
    """

    def __init__(self, name: str, weight: torch.Tensor, *, ops: EagerOps) -> None:
        self.name = name
        self._ops = ops
        self.size = weight.numel()
        self.error = float("inf")
        self.chosen: Matrix | None = None
        self._weight: torch.Tensor | None = weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the exact product `(n, out)` of rows `(n, in)`."""
        if self._weight is None:
            raise RuntimeError(f"{self.name} was tried already.")
        weight, self._weight = self._weight, None
        exact, columns = linear(rows.float(), weight.float()), weight.shape[1]
        kinds: list[type[Int8Matrix | GroupedInt8Matrix]] = [Int8Matrix]
        if columns > _GROUP_SIZE and not columns % _GROUP_SIZE:
            kinds.append(GroupedInt8Matrix)
        for kind in kinds:
            small = kind(weight, self._ops)
            off = torch.linalg.vector_norm(small(rows.float()) - exact, dim=1)
            self.error = float((off / torch.linalg.vector_norm(exact, dim=1).clamp_min(TINY)).mean())
            if self.kept_small:
                self.chosen = small
                break
        else:
            self.chosen = as_matrix(weight)
        return exact.to(rows.dtype)

    @property
    def kept_small(self) -> bool:
        """Whether the 8-bit product is good enough; no number is not."""
        return self.error <= MAX_ERROR

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the exact product of rows to `total`, in place."""
        total.add_(self(rows))


def settle(weights: Weights) -> tuple[Weights, Quantization]:
    """Return the weights with what every trial chose in its place, and the report."""
    trials: list[Trial] = []

    def chosen(matrix: Matrix) -> Matrix:
        if not isinstance(matrix, Trial) or matrix.chosen is None:
            raise RuntimeError("a matrix was not tried.")
        trials.append(matrix)
        return matrix.chosen

    def settled(layer: Layer) -> Layer:
        return replace(
            layer,
            qkv=chosen(layer.qkv),
            query=None if layer.query is None else chosen(layer.query),
            output=chosen(layer.output),
            gate_up=chosen(layer.gate_up),
            down=chosen(layer.down),
        )

    layers = tuple(map(settled, weights.layers))
    exact = [trial for trial in trials if not trial.kept_small]
    return replace(weights, layers=layers), Quantization(
        errors={trial.name: trial.error for trial in trials},
        grouped=tuple(trial.name for trial in trials if isinstance(trial.chosen, GroupedInt8Matrix)),
        exact=tuple(trial.name for trial in exact),
        exact_share=sum(trial.size for trial in exact) / sum(trial.size for trial in trials),
    )


def trial_prompts(encoder: PromptEncoder) -> QueryGroup:
    """Return the fixed prompts whose rows the matrices are tried on: several scripts, code, a table, numbers."""
    prompts = encoder.encode_checked(_TRIAL_QUERY, _TRIAL_TEXTS, None)
    return group_prompts([prompt.ids for prompt in prompts])
