"""Hardware and versions, written beside every figure."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from qwen_rerank.extras import installed_version

_PACKAGES = (
    "qwen-rerank",
    "torch",
    "transformers",
    "sentence-transformers",
    "faiss-cpu",
    "faiss-gpu",
    "bm25s",
    "numpy",
)


def environment() -> dict[str, object]:
    """Return what a figure was measured on: processor, cores, GPUs where torch is loaded, Python and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": _gpus(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := installed_version(name)) is not None},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # where nothing has loaded it, nothing was measured on a GPU
    if torch is None:
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
