"""The matrices of the forward pass; on the CPU in the order that oneDNN's kernels read."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch.nn.functional import linear

_PACKED_FOR_ROWS = 512  # near the row chunk; the packing serves other counts as well


class Matrix(Protocol):
    """A matrix `(out, in)` that rows are multiplied by."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        ...

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows `(n, in)` to `total` `(n, out)`, in place."""
        ...


class PlainMatrix:
    """Works everywhere.

    Args:
        weight: `(out, in)`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        return linear(rows, self._weight)

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows to `total`, in place."""
        total.addmm_(rows, self._weight.t())


class PackedMatrix:
    """A copy in oneDNN's own layout: up to twice as fast as the plain one on CPUs where that goes to MKL.

    Args:
        weight: `(out, in)`; not kept.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `(n, out)` of rows `(n, in)`."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, None, "none", [], "")
        return product

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows to `total`, in place."""
        total.add_(self(rows))


def as_matrix(weight: torch.Tensor) -> Matrix:
    """Return a matrix in the fastest form for its device and dtype; the choice depends on nothing else."""
    packed = weight.device.type == "cpu" and _packs(weight.dtype)
    return PackedMatrix(weight) if packed else PlainMatrix(weight)


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this build and CPU have the kernels, and they are right."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = torch.linspace(-1.0, 1.0, 64 * 32).view(64, 32).to(dtype)
    rows = torch.linspace(-1.0, 1.0, 3 * 32).view(3, 32).to(dtype)
    try:
        found = PackedMatrix(weight)(rows)
    except (AttributeError, RuntimeError, NotImplementedError):  # private operators: another version may lack them
        return False
    return torch.allclose(found.float(), linear(rows.float(), weight.float()), rtol=0.02, atol=0.02)
