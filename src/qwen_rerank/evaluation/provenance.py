"""The provenance of a figure: hardware, versions, and whether a model was trained on the collection."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from qwen_rerank.extras import installed_version

_PACKAGES = (
    "qwen-rerank",
    "torch",
    "transformers",
    "sentence-transformers",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
)


# Training data of Qwen3-Reranker as its mteb metadata lists it; the keys are spellings of collections built from it.
QWEN3_RERANKER = {
    "t2ranking": "T2Ranking",
    "t2retrieval": "T2Ranking",
    "t2reranking": "T2Ranking",
    "dureader": "DuReader (DuRetrieval)",
    "duretrieval": "DuReader (DuRetrieval)",
    "msmarco": "MS MARCO",
    "mmarco": "MS MARCO",
    "nq": "Natural Questions",
    "naturalquestions": "Natural Questions",
    "hotpotqa": "HotpotQA",
    "miracl": "MIRACL",
    "mrtidy": "Mr. TyDi",
    "mrtydi": "Mr. TyDi",
    "mldr": "MLDR",
    "multilongdoc": "MLDR",
    "codesearchnet": "CodeSearchNet",
    "multicpr": "Multi-CPR",
    "simclue": "SimCLUE",
    "nli": "NLI",
}

# Training data of Qwen3-Embedding as its mteb metadata lists it.
QWEN3_EMBEDDING = {
    **{
        spelling: name
        for spelling, name in QWEN3_RERANKER.items()
        if name not in ("MLDR", "Multi-CPR", "SimCLUE", "NLI")
    },
    "fever": "FEVER",
    "cmedqa": "CMedQA",
}

# What the shipped small models were trained on: these corpora or their training queries (see pocket/MODEL_CARD.md).
POCKET = {
    "cmrc2018": "CMRC 2018",
    "drcd": "DRCD",
    "dureader": "DuReader",
    "scifact": "SciFact",
    "qmsum": "QMSum",
}


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


def in_domain(collection: str, *, training: Mapping[str, str] = QWEN3_RERANKER) -> str | None:
    """Return the training set that `collection` comes from by its name, or None where none is known.

    Figures on such a collection say how well a model remembers, not how well it searches. A name proves nothing: None means "not known to be", never "clean".
    """
    name = collection.lower()
    squeezed = re.sub(r"[^a-z0-9]", "", name)
    words = set(re.findall(r"[a-z0-9]+", name))
    for spelling, training_set in training.items():
        # A short spelling ("nq", "nli") must be a word of its own, as it occurs inside many others.
        if spelling in words or (len(spelling) > 3 and spelling in squeezed):
            return training_set
    return None
