"""What is damaged, as far as it can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_rerank.store.errors import CorruptStoreError
from qwen_rerank.store.index import VectorIndex
from qwen_rerank.store.opening import check_folder, check_truth, resolve
from qwen_rerank.store.truth import Truth


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The state of a store.

    Attributes:
        documents: How many documents were read.
        damaged_ids: Ids of documents whose row or vector is damaged, as far as they can be read.
        problems: One sentence for each thing that is wrong; empty when the store is sound.
    """

    documents: int
    damaged_ids: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_store(path: str | os.PathLike[str]) -> VerifyReport:
    """Check every byte of a store's truth, also of one that does not open; nothing is changed.

    Raises:
        StoreNotFoundError: If nothing is there.
        NotAStoreError: If something else is.
        FormatTooNewError: If a newer version wrote it.
    """
    folder = resolve(path)
    try:
        check_folder(folder)
    except CorruptStoreError as exc:
        return VerifyReport(0, (), (str(exc),))
    database = Truth(folder, read_only=True, writable=os.access(folder, os.W_OK))
    try:
        with database.snapshot():
            return examine(database, folder, None)
    except CorruptStoreError as exc:
        return VerifyReport(0, (), (str(exc),))
    finally:
        database.close()


def examine(truth: Truth, folder: Path, index: VectorIndex | None) -> VerifyReport:
    """Return what is wrong with a truth and, where given, with the index over it; inside a snapshot."""
    problems: list[str] = []
    try:
        check_truth(truth, folder)
    except CorruptStoreError as exc:
        problems.append(f"{exc.file.name}: {exc.reason}")
    documents, damaged = truth.damaged()
    problems += [reason for _, reason in damaged]
    if index is not None and not damaged:
        problems += _compare(truth, index)
    ids = [name for name, _ in damaged if name is not None]
    return VerifyReport(documents, tuple(dict.fromkeys(ids)), tuple(problems))


def _compare(truth: Truth, index: VectorIndex) -> list[str]:
    rows = truth.vector_rows()
    if not np.array_equal(rows, index.rows()):
        return [f"the FAISS index has {len(index)} vectors, not the {len(rows)} of the truth"]
    if not np.array_equal(index.vectors(), truth.vectors(rows, dim=index.dim)):
        return ["the vectors of the FAISS index are not those of the truth"]
    return []
