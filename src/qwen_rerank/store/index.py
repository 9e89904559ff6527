"""A FAISS index in memory over the vectors of a store's database, found by row number."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store.errors import StoreIOError
from qwen_rerank.store.faiss_build import MAX_GPU_K, load_faiss

_log = logging.getLogger(__name__)

_EF_CONSTRUCTION = 80
_EF_SEARCH = 512  # 95 % of the exact 100 best of a million texts
_PER_NODE = 10  # vectors that are compared one after the other in the time of a node of a graph, measured on 60,000
# Lists are all looked through then, 3 ns a forbidden vector; comparing an allowed one costs 1 us, measured on a million.
_EXACT_BELOW = 0.002
_GATHERED = 2000  # as many whole vectors are looked up one by one in less time than a pass over all takes
_DROP_DEAD_ABOVE = 0.25
_AUTO_FLAT = 100_000  # up to so many vectors a search that compares all of them is fast enough
_TRAIN_PER_LIST = 40  # vectors; FAISS warns below 39
_TRAIN_CODES = 20_000  # vectors for an index without lists that needs training
_PROBED = 400  # lists that a search reads unless it was tuned: 95 % of the exact 100 best of 0.2 and of 1 million texts
_CHOICES_REMEMBERED = 8
_AT_ONCE = 50_000  # vectors decoded at a time


def parse_factory(index: object, dim: int) -> str:
    """Return `index` as it is kept: "auto", or a FAISS factory string, "HNSW32,Flat" as "HNSW32".

    Raises:
        InvalidInputError: If it is none, or of a kind that cannot be filtered.
    """
    known = (
        "'auto', 'Flat', 'HNSW<4 to 128>' such as 'HNSW32' or 'HNSW32,SQ8,RFlat', or lists such as 'IVF1024,SQ8' or "
        "'IVF1024,Flat'"
    )
    if index in ("auto", "Flat"):
        return str(index)
    match = re.fullmatch(r"HNSW(\d{1,3})(,Flat)?(,SQ8,RFlat)?", index) if isinstance(index, str) else None
    if match and 4 <= int(match[1]) <= 128 and not (match[2] and match[3]):
        return f"HNSW{int(match[1])}{match[3] or ''}"
    if not isinstance(index, str) or not index or index.startswith("HNSW"):
        raise InvalidInputError(f"index must be {known}, not {index!r}.")
    faiss = load_faiss()
    try:
        made = faiss.index_factory(dim, index, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError) as exc:
        raise InvalidInputError(f"index must be {known}, not {index!r}: FAISS says {exc}.") from exc
    finder = _finder(faiss, made)
    if not isinstance(finder, faiss.IndexIVF | faiss.IndexFlatCodes) or "FastScan" in type(finder).__name__:
        raise InvalidInputError(f"index={index!r} is a {type(made).__name__}, which cannot be filtered; take {known}.")
    return index


def planned(factory: str, count: int) -> str:
    """Return the FAISS factory string that is built for so many vectors; too few to train with are kept as they are."""
    if factory == "auto":
        return "Flat" if count < _AUTO_FLAT else "HNSW32,SQ8,RFlat"
    n_lists = re.match(r"IVF(\d+)", factory)
    untrained = re.fullmatch(r"Flat|HNSW\d+", factory)
    needed = int(n_lists[1]) * _TRAIN_PER_LIST if n_lists else 0 if untrained else 1000
    return factory if count >= needed else "Flat"


def _finder(faiss: ModuleType, index: Any) -> Any:
    """Return the index that finds candidates, where another ranks them by whole vectors ("RFlat"), or the index itself."""
    return faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefineFlat) else index


def _deeper(k: int) -> int:
    """Return how many are found where `k` are wanted: what saved bits put just behind comes to the front again."""
    return k + max(20, k // 4)


@dataclass(frozen=True, slots=True)
class _Choice:
    """The positions that a search may find."""

    allowed: np.ndarray | None  # as given to the search
    mask: np.ndarray  # bool (n_positions,)
    count: int
    selector: Any | None  # FAISS's, None for all positions


class VectorIndex:
    """Vectors by row number, ascending; removed ones stay as dead positions that no search returns.

    An index that keeps vectors in fewer bits only finds candidates: their scores and their order are then those of the
    whole vectors, which it keeps too ("RFlat") or which are read from where they are stored.

    Args:
        faiss: The FAISS module.
        factory: "auto" or a FAISS factory string.
        dim: Length of a vector.
        gpu: FAISS's GPU resources, or None for the CPU. Only Flat searches run there.
        effort: How many lists (IVF) or nodes (HNSW) a search looks into; 0 is a share that suits most.
        stored: Returns the stored vectors of ascending rows, float32 `(n, dim)`; needed where bits are saved.
    """

    def __init__(
        self,
        faiss: ModuleType,
        factory: str,
        dim: int,
        *,
        gpu: Any | None = None,
        effort: int = 0,
        stored: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._faiss = faiss
        self.factory = factory
        self.dim = dim
        self._gpu = gpu
        self.effort = effort
        self._stored = stored
        self.kind = "Flat" if planned(factory, 0) == "Flat" else factory
        self._adopt(faiss.IndexIDMap(self._new_base(self.kind)))

    def _new_base(self, kind: str) -> Any:
        if kind == "Flat":
            return self._faiss.IndexFlatIP(self.dim)
        base = self._faiss.index_factory(self.dim, kind, self._faiss.METRIC_INNER_PRODUCT)
        if kind.startswith("HNSW"):
            _finder(self._faiss, base).hnsw.efConstruction = _EF_CONSTRUCTION
        lists = self._lists(base)
        if lists is not None:
            lists.cp.niter = 10
            lists.cp.spherical = True  # lists of an inner product are told apart by direction
        if isinstance(base, self._faiss.IndexIVF):
            base.make_direct_map(True)  # so that a vector can be decoded by its position
        return base

    def _parts(self, base: Any) -> tuple[type, type]:
        return type(base), type(_finder(self._faiss, base))

    def _lists(self, base: Any) -> Any | None:
        """Return that part of an index which keeps vectors in lists, if one does."""
        finder = _finder(self._faiss, base)
        return finder if isinstance(finder, self._faiss.IndexIVF) else None

    def start(self, count: int, sample: Callable[[int], np.ndarray]) -> None:
        """Become the index that suits so many vectors, trained on a sample where it needs that; it must be empty.

        Args:
            count: How many vectors will be added.
            sample: Returns so many of them, float32 `(n, dim)`.
        """
        self.kind = planned(self.factory, count)
        base = self._new_base(self.kind)
        if not base.is_trained:
            lists = self._lists(base)
            vectors = sample(min(count, _TRAIN_CODES if lists is None else lists.nlist * _TRAIN_PER_LIST))
            _log.info("The index %s is trained on %d vectors.", self.kind, len(vectors))
            base.train(vectors)
        self._adopt(self._faiss.IndexIDMap(base))

    def efforts(self, top_k: int) -> list[int]:
        """Return the efforts that are worth trying, ascending; none for an index that compares all vectors.

        A graph looks into as many nodes as are found, however few it is told to; keeping fewer would only make shorter
        results worse than the one that was measured.
        """
        if (lists := self._lists(self._base)) is not None:
            steps = range(int(2 * math.log2(lists.nlist)) + 1)
        else:
            steps = range(10, 23) if self.kind.startswith("HNSW") else range(0)
        found = sorted({round(math.sqrt(2) ** step) for step in steps})
        if self.looks_into == "nodes":
            found = [effort for effort in found if effort >= _deeper(top_k)] or [_deeper(top_k)]
        return found

    @property
    def looks_into(self) -> str:
        """The unit of an effort: "lists", "nodes", or "" where every vector is compared."""
        return "nodes" if self.kind.startswith("HNSW") else "" if self._lists(self._base) is None else "lists"

    @property
    def outgrown(self) -> bool:
        """Whether there are so many vectors by now that another index would suit them better."""
        return self.kind == "Flat" != planned(self.factory, len(self))

    @property
    def lossless(self) -> bool:
        """Whether it holds every vector as it was added."""
        return re.fullmatch(r"Flat|HNSW\d+|IVF\d+,Flat|.+,RFlat", self.kind) is not None

    def _adopt(self, index: Any) -> None:
        self._index = index
        self._base = self._faiss.downcast_index(index.index)
        if (lists := self._lists(self._base)) is not None:
            lists.parallel_mode = 1  # one query's lists are shared out among threads; no file keeps this
        whole = getattr(self._base, "refine_index", getattr(self._base, "storage", None))
        self._whole = None if whole is None else self._faiss.downcast_index(whole)
        self._rows = self._faiss.vector_to_array(index.id_map).astype(np.int64)
        self._alive = np.ones(len(self._rows), dtype=bool)
        self._hidden = 0
        self._choices: list[_Choice] = []
        self._on_gpu: Any | None = None

    def __len__(self) -> int:
        return int(np.count_nonzero(self._alive))

    @property
    def exact(self) -> bool:
        """Whether every search compares all vectors."""
        return self.kind == "Flat"

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

    def add(self, rows: np.ndarray, vectors: np.ndarray, *, hidden: bool = False) -> None:
        """Add float32 `(n, dim)` vectors under row numbers above every one before; `hidden` ones are dead until `show`."""
        self._index.add_with_ids(vectors, rows)
        self._rows = np.concatenate([self._rows, rows])
        self._alive = np.concatenate([self._alive, np.full(len(rows), not hidden)])
        self._hidden += len(rows) if hidden else 0
        self._choices = []

    def show(self) -> None:
        """Let searches find the hidden vectors, which are the ones that were added last."""
        self._alive[len(self._alive) - self._hidden :] = True
        self._hidden = 0
        self._choices = []

    @property
    def step(self) -> int:
        """The number of vectors that are added in some hundredths of a second."""
        return 128 if self.kind.startswith("HNSW") else 2000

    def remove(self, rows: np.ndarray) -> None:
        """Make these rows dead; unknown ones are ignored."""
        self._alive &= ~np.isin(self._rows, rows)
        self._choices = []
        if self.exact and self.dead > max(1000, _DROP_DEAD_ABOVE * len(self._rows)):
            self._index.remove_ids(self._faiss.IDSelectorBatch(self._rows[~self._alive]))
            self._adopt(self._index)

    def vectors(self) -> np.ndarray:
        """Return the vectors of `rows()` as it holds them, float32 `(n, dim)`."""
        return self._decoded(np.flatnonzero(self._alive))

    def _decoded(self, positions: np.ndarray) -> np.ndarray:
        if not len(positions):
            return np.empty((0, self.dim), dtype=np.float32)
        return np.asarray(self._base.reconstruct_batch(positions.astype(np.int64)))

    # Searching

    def search(
        self, vectors: np.ndarray, top_k: int, allowed: np.ndarray | None = None, *, effort: int = 0
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each of float32 `(n, dim)` queries its best `(rows, scores)`, at most `top_k`.

        Equal scores are in the order of their rows.

        Args:
            vectors: The queries.
            top_k: At least 1; more than there are is all there are.
            allowed: For each row number from 0 whether it may be found, bool; None is all.
            effort: In place of the index's own; 0 is that.
        """
        among = self._among(allowed)
        wanted = min(top_k, among.count)
        if wanted == 0 or len(vectors) == 0:
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in vectors]
        vectors = np.ascontiguousarray(vectors)
        if self.lossless:
            scores, positions = self._nearest(vectors, wanted, among, effort)
        else:
            depth = min(among.count, _deeper(wanted))
            scores, positions = self._by_stored(vectors, self._nearest(vectors, depth, among, effort)[1], wanted)
        return [self._ordered(*pair) for pair in zip(positions, scores, strict=True)]

    def _among(self, allowed: np.ndarray | None) -> _Choice:
        """Return the positions that are alive and may be found; those of the last few arrays are remembered."""
        for one in self._choices:
            if one.allowed is allowed:
                return one
        mask = self._alive if allowed is None else allowed[self._rows] & self._alive
        count = int(np.count_nonzero(mask))
        selector = None
        if count < len(mask):
            selector = self._faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        self._choices = [*self._choices[1 - _CHOICES_REMEMBERED :], _Choice(allowed, mask, count, selector)]
        return self._choices[-1]

    def _ordered(self, positions: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.lexsort((positions, -scores))
        return self._rows[positions[order]], scores[order]

    def _nearest(self, vectors: np.ndarray, k: int, among: _Choice, effort: int) -> tuple[np.ndarray, np.ndarray]:
        selector = among.selector
        if self.exact:
            if self._gpu is not None and selector is None and k <= MAX_GPU_K:
                return self._gpu_index().search(vectors, k)  # type: ignore[no-any-return]
            parameters = None if selector is None else self._faiss.SearchParameters(sel=selector)
            return self._base.search(vectors, k, params=parameters)  # type: ignore[no-any-return]
        share = among.count / len(self._rows)
        if self.kind.startswith("HNSW"):
            few = selector is not None and among.count < _PER_NODE * self._nodes(k, share, effort)
        else:
            few = share < _EXACT_BELOW
        if not few:
            scores, positions = self._base.search(vectors, k, params=self._parameters(k, selector, share, effort))
            if (positions >= 0).all():
                return scores, positions
        # Few are allowed, or the search did not reach as many as there are.
        if self._whole is not None and among.count > _GATHERED:
            return self._whole.search(vectors, k, params=self._faiss.SearchParameters(sel=selector))  # type: ignore[no-any-return]
        return self._compared(vectors, np.flatnonzero(among.mask), k)

    def _parameters(self, k: int, selector: Any | None, share: float, effort: int) -> Any:
        if self.kind.startswith("HNSW"):
            found = self._faiss.SearchParametersHNSW(sel=selector, efSearch=self._nodes(k, share, effort))
        elif (lists := self._lists(self._base)) is not None:
            # The nearest of few allowed ones lie further away than the nearest of all; of very few, every list is
            # looked through, which costs one bit for each forbidden vector.
            probes = (effort or self.effort or _PROBED) / math.sqrt(share)
            found = self._faiss.SearchParametersIVF(sel=selector, nprobe=min(lists.nlist, math.ceil(probes)))
        else:
            found = self._faiss.SearchParameters(sel=selector)
        if self.kind.endswith(",RFlat"):
            return self._faiss.IndexRefineSearchParameters(k_factor=_deeper(k) / k, base_index_params=found)
        return found

    def _nodes(self, k: int, share: float, effort: int) -> int:
        """Return how many nodes of a graph a search looks into; the forbidden ones count too."""
        return max(math.ceil((effort or self.effort or _EF_SEARCH) / share), k)

    def _compared(self, vectors: np.ndarray, among: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and positions of the best `k` of these positions, all of them compared."""
        scores, positions = np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
        for start in range(0, len(among), _AT_ONCE):
            part = among[start : start + _AT_ONCE]
            scores = np.hstack([scores, vectors @ self._decoded(part).T])
            positions = np.hstack([positions, np.broadcast_to(part, (len(vectors), len(part)))])
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, positions = np.take_along_axis(scores, best, 1), np.take_along_axis(positions, best, 1)
        return scores, positions

    def _by_stored(self, vectors: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores by the stored vectors, and the positions of the best `k` by them."""
        unique, inverse = np.unique(positions, return_inverse=True)
        exact = self._decoded(unique) if self._stored is None else self._stored(self._rows[unique])
        scores = np.einsum("qkd,qd->qk", exact[inverse.reshape(positions.shape)], vectors)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(positions, best, 1)

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
        kinds = ["Flat", planned(self.factory, len(rows))]
        if self.factory == "auto":
            kinds += ["IVF1,SQ8", "IVF1,SQ8,RFlat"]  # which it once built
        kind = next((one for one in kinds if self._parts(self._new_base(one)) == self._parts(base)), None)
        if (
            kind is None
            or base.metric_type != self._faiss.METRIC_INNER_PRODUCT
            or base.d != self.dim
            or base.ntotal != len(rows)
            or (np.diff(rows, prepend=0) <= 0).any()
        ):
            raise ValueError("it is another kind of index")
        lists = self._lists(base)
        self.kind = kind if lists is None else re.sub(r"IVF\d+", f"IVF{lists.nlist}", kind)
        self._adopt(index)
