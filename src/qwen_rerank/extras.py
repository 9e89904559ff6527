"""The extras of this package: what each brings, what of it is installed, and the pip line that installs it here."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

# Each with all that it needs beside the base install; `doctor` looks for these, and a test compares them with pyproject.toml.
EXTRAS = {
    "local": ("torch", "tiktoken", "numba"),
    "transformers": ("torch", "tiktoken", "numba", "transformers"),
    "dense": ("torch", "tiktoken", "numba", "transformers", "sentence-transformers"),
    "langchain": ("langchain-core",),
    "llama-index": ("llama-index-core",),
    "serve": ("fastapi", "uvicorn", "h11", "prometheus-client"),
    "client": ("httpx2", "pydantic-core"),
    "eval": ("ir-measures", "scipy", "scikit-learn", "matplotlib"),
    "train": ("torch", "tiktoken", "numba", "transformers", "sentence-transformers", "datasets", "accelerate", "peft"),
    "hub": ("datasets",),
    "files": (
        "charset-normalizer",
        "openpyxl",
        "pathspec",
        "pypdfium2",
        "python-docx",
        "python-pptx",
        "selectolax",
    ),
    "mcp": ("mcp",),
    "bulk": ("pyarrow",),
}

_PARENT = Path(__file__).resolve().parents[1]  # "src" of a checkout, else site-packages


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    from importlib import metadata  # brings the parser of mails, which nothing else needs

    try:
        return metadata.version(distribution)
    except (
        metadata.PackageNotFoundError,
        OSError,
        ValueError,
    ):  # what its files say may be unreadable, and it still work
        return None


def is_importable(*modules: str) -> bool:
    """Return whether all of these modules are there, without importing them."""
    try:
        return all(find_spec(name) is not None for name in modules)
    except ImportError:
        return False


def memory_bytes() -> int | None:
    """Return the machine's memory, the container's limit counted where there is one."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def pip_line(extra: str) -> str:
    """Return the command that adds an extra to this installation, to the checkout where the package runs from one."""
    checkout = _PARENT.parent
    if _PARENT.name == "src" and (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    # Works without an index that has the package: pip reads the extras of what is installed.
    return f"pip install 'qwen-rerank[{extra}]'"
