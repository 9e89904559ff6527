"""Which FAISS is installed, and whether it is sound."""

from __future__ import annotations

from importlib import metadata
from types import ModuleType

from qwen_rerank.errors import MissingExtraError
from qwen_rerank.store.errors import FaissWheelsError

_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")


def faiss_wheels() -> dict[str, str]:
    """Return the installed FAISS distributions with their versions; more than one is a broken installation."""
    found = {}
    for name in _WHEELS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
            f"pip uninstall -y {' '.join(wheels)} && pip install 'qwen-rerank[{keep}]'"
        )
    try:
        import faiss
    except ImportError as exc:
        raise MissingExtraError("FaissStore", package="faiss-cpu", extra="faiss-cpu", cause=exc) from exc
    return faiss
