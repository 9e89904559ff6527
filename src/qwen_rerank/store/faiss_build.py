"""The installed FAISS: which package it is, whether it is sound, and whether it can search on a GPU."""

from __future__ import annotations

import logging
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np

from qwen_rerank.checks import check_choice
from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.extras import installed_version, pip_line
from qwen_rerank.store.errors import FaissWheelsError

_log = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")
MAX_GPU_K = 2048  # what FAISS's GPU selection can return
_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")


def faiss_wheels() -> dict[str, str]:
    """Return the installed FAISS distributions with their versions; more than one is a broken installation."""
    return {name: version for name in _WHEELS if (version := installed_version(name)) is not None}


def load_faiss() -> ModuleType:
    """Return the module `faiss`.

    Raises:
        FaissWheelsError: If several FAISS packages are installed. They own the same folder: the later one wins, and
            removing either takes files of the other.
        MissingExtraError: If none is.
    """
    wheels = list(faiss_wheels())
    if len(wheels) > 1:
        keep = "faiss-gpu" if "faiss-gpu" in wheels else "faiss-cpu"
        raise FaissWheelsError(
            f"{' and '.join(wheels)} are installed over each other in one folder; keep one: "
            f"pip uninstall -y {' '.join(wheels)} && {pip_line(keep)}"
        )
    try:
        import faiss
    except ImportError as exc:
        raise MissingExtraError("FaissStore", package="faiss-cpu", extra="faiss-cpu", cause=exc) from exc
    return faiss


def gpu_resources(faiss: ModuleType, device: str) -> Any | None:
    """Return FAISS's GPU resources, or None to search on the CPU; with `device="auto"` the reason is in the log.

    Raises:
        InvalidInputError: If `device="cuda"` and a search on the GPU does not work.
    """
    check_choice("device", device, DEVICES)
    if device == "cpu":
        return None
    resources, reason = gpu_or_reason(faiss)
    if resources is None and device == "cuda":
        raise InvalidInputError(f"device='cuda' does not work: {reason}; use device='cpu' or install faiss-gpu.")
    if resources is None:
        _log.info("FAISS searches on the CPU: %s.", reason)
    return resources


def gpu_or_reason(faiss: ModuleType) -> tuple[Any | None, str]:
    """Return FAISS's GPU resources where a search with them works, else None and why not."""
    # faiss-cpu has no GPU classes at all; a GPU build without kernels for this GPU fails only when it searches.
    if not hasattr(faiss, "StandardGpuResources"):
        return None, "this is FAISS's CPU build"
    if faiss.get_num_gpus() < 1:
        return None, "FAISS sees no GPU"
    try:
        resources = faiss.StandardGpuResources()
        index = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(4))
        index.add(np.eye(4, dtype=np.float32))
        _, found = index.search(np.eye(4, dtype=np.float32), 1)
    except (RuntimeError, AssertionError) as exc:
        return None, f"a first search on the GPU failed ({exc})"
    if found[:, 0].tolist() != [0, 1, 2, 3]:
        return None, "a first search on the GPU gave wrong answers"
    return resources, ""


def _search_alone() -> None:
    # The thread that forked has lost OpenMP's helpers and would wait for them for ever; other threads get new ones.
    if (faiss := sys.modules.get("faiss")) is not None:
        faiss.omp_set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_search_alone)
