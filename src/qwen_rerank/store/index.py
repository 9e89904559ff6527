"""A FAISS index in memory over the vectors of a store's database, found by row number."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store.errors import StoreIOError
from qwen_rerank.store.faiss_build import MAX_GPU_K

_log = logging.getLogger(__name__)

_EF_CONSTRUCTION = 80
_EF_SEARCH = 256
# Under this share of allowed vectors the graph loses its way among the forbidden ones, and comparing all allowed ones
# costs less than walking it.
_EXACT_BELOW = 0.1
_DROP_DEAD_ABOVE = 0.25


def parse_factory(index: object) -> str:
    """Return the FAISS factory string for `index`: "auto" and "Flat" give "Flat", "HNSW32" itself.

    Raises:
        InvalidInputError: If it is of another kind.
    """
    if index in ("auto", "Flat"):
        return "Flat"
    match = re.fullmatch(r"HNSW(\d{1,3})(,Flat)?", index) if isinstance(index, str) else None
    if match and 4 <= int(match[1]) <= 128:
        return f"HNSW{int(match[1])}"
    raise InvalidInputError(f"index must be 'auto', 'Flat' or 'HNSW<4 to 128>' such as 'HNSW32', not {index!r}.")


class VectorIndex:
    """Vectors by row number, ascending; removed ones stay as dead positions that no search returns.

    Args:
        faiss: The FAISS module.
        factory: "Flat" or "HNSW<M>".
        dim: Length of a vector.
        gpu: FAISS's GPU resources, or None for the CPU. Only Flat searches run there.
    """

    def __init__(self, faiss: ModuleType, factory: str, dim: int, *, gpu: Any | None = None) -> None:
        self._faiss = faiss
        self.factory = factory
        self.dim = dim
        self._gpu = gpu
        self._adopt(faiss.IndexIDMap(self._new_base()))

    def _new_base(self) -> Any:
        if self.factory == "Flat":
            return self._faiss.IndexFlatIP(self.dim)
        base = self._faiss.IndexHNSWFlat(self.dim, int(self.factory[4:]), self._faiss.METRIC_INNER_PRODUCT)
        base.hnsw.efConstruction = _EF_CONSTRUCTION
        return base

    def _adopt(self, index: Any) -> None:
        self._index = index
        self._base = self._faiss.downcast_index(index.index)
        self._rows = self._faiss.vector_to_array(index.id_map).astype(np.int64)
        self._alive = np.ones(len(self._rows), dtype=bool)
        self._on_gpu: Any | None = None

    def __len__(self) -> int:
        return int(self._alive.sum())

    @property
    def exact(self) -> bool:
        """Whether every search compares all vectors."""
        return self.factory == "Flat"

    @property
    def dead(self) -> int:
        """The number of removed vectors that it still holds."""
        return len(self._rows) - len(self)

    def rows(self) -> np.ndarray:
        """Return the row numbers that a search can give, int64, ascending."""
        return np.asarray(self._rows[self._alive])

    def last_row(self) -> int:
        """Return the highest row number that it holds, dead ones included; 0 when empty."""
        return int(self._rows[-1]) if len(self._rows) else 0

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Add float32 `(n, dim)` vectors under row numbers above every one before."""
        self._index.add_with_ids(vectors, rows)
        self._rows = np.concatenate([self._rows, rows])
        self._alive = np.concatenate([self._alive, np.ones(len(rows), dtype=bool)])

    def remove(self, rows: np.ndarray) -> None:
        """Make these rows dead; unknown ones are ignored."""
        self._alive &= ~np.isin(self._rows, rows)
        if self.exact and self.dead > max(1000, _DROP_DEAD_ABOVE * len(self._rows)):
            self._index.remove_ids(self._faiss.IDSelectorBatch(self._rows[~self._alive]))
            self._adopt(self._index)

    def vectors(self) -> np.ndarray:
        """Return the vectors of `rows()`, float32 `(n, dim)`."""
        storage = self._storage()
        if not len(self._rows):
            return np.empty((0, self.dim), dtype=np.float32)
        return np.asarray(storage.reconstruct_n(0, len(self._rows)))[self._alive]

    def _storage(self) -> Any:
        return self._base if self.exact else self._faiss.downcast_index(self._base.storage)

    # Searching

    def search(
        self, vectors: np.ndarray, top_k: int, allowed: np.ndarray | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each of float32 `(n, dim)` queries its best `(rows, scores)`, at most `top_k`.

        Equal scores are in the order of their rows.

        Args:
            vectors: The queries.
            top_k: At least 1; more than there are is all there are.
            allowed: Row numbers to choose from, int64, ascending; None is all.
        """
        mask = self._alive if allowed is None else self._among(allowed)
        count = int(mask.sum())
        wanted = min(top_k, count)
        if wanted == 0 or len(vectors) == 0:
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in vectors]
        scores, positions = self._nearest(vectors, wanted, mask, count)
        return [self._ordered(*pair) for pair in zip(positions, scores, strict=True)]

    def _among(self, allowed: np.ndarray) -> np.ndarray:
        """Return which positions are alive and of these ascending rows, bool `(n_positions,)`."""
        mask = np.zeros(len(self._rows), dtype=bool)
        positions = np.searchsorted(self._rows, allowed)
        positions[positions == len(self._rows)] = 0
        mask[positions[self._rows[positions] == allowed] if len(self._rows) else positions[:0]] = True
        return mask & self._alive

    def _ordered(self, positions: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.lexsort((positions, -scores))
        return self._rows[positions[order]], scores[order]

    def _nearest(self, vectors: np.ndarray, k: int, mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        all_alive = count == len(self._rows)
        selector = None if all_alive else self._faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        if self.exact:
            if self._gpu is not None and all_alive and k <= MAX_GPU_K:
                return self._gpu_index().search(vectors, k)  # type: ignore[no-any-return]
            return self._exact(vectors, k, selector)
        if count >= _EXACT_BELOW * len(self._rows):
            parameters = self._faiss.SearchParametersHNSW(sel=selector, efSearch=max(_EF_SEARCH, 2 * k))
            scores, positions = self._base.search(vectors, k, params=parameters)
            if (positions >= 0).all():
                return scores, positions
        # The graph did not reach as many as there are.
        return self._exact(vectors, k, selector)

    def _exact(self, vectors: np.ndarray, k: int, selector: Any | None) -> tuple[np.ndarray, np.ndarray]:
        parameters = None if selector is None else self._faiss.SearchParameters(sel=selector)
        return self._storage().search(vectors, k, params=parameters)  # type: ignore[no-any-return]

    def _gpu_index(self) -> Any:
        if self._on_gpu is None:
            self._on_gpu = self._faiss.index_cpu_to_gpu(self._gpu, 0, self._base)
        elif self._on_gpu.ntotal < len(self._rows):
            done = self._on_gpu.ntotal
            self._on_gpu.add(self._base.reconstruct_n(done, len(self._rows) - done))
        return self._on_gpu

    # Files

    def write(self, path: Path) -> None:
        """Write a FAISS `IndexIDMap` whose ids are row numbers.

        Raises:
            StoreIOError: If it cannot be written.
        """
        try:
            self._faiss.write_index(self._index, str(path))
        except RuntimeError as exc:
            raise StoreIOError(f"{path} could not be written ({exc}).") from exc

    def read(self, path: Path) -> None:
        """Take the content of a file that was verified; FAISS itself trusts what it reads.

        Raises:
            ValueError: If the file is not an index of this kind.
        """
        try:
            index = self._faiss.read_index(str(path))
        except RuntimeError as exc:
            raise ValueError(f"FAISS cannot read it ({exc})") from exc
        if type(index) is not self._faiss.IndexIDMap:
            raise ValueError(f"it is a {type(index).__name__}")
        base = self._faiss.downcast_index(index.index)
        rows = self._faiss.vector_to_array(index.id_map)
        same_kind = type(base) is type(self._base) and base.metric_type == self._base.metric_type
        if not same_kind or base.d != self.dim or base.ntotal != len(rows) or (np.diff(rows, prepend=0) <= 0).any():
            raise ValueError("it is another kind of index")
        self._adopt(index)
