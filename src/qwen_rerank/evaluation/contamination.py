"""Collections that the reranker was trained on: figures on them say how well it remembers, not how well it searches."""

from __future__ import annotations

import re
from collections.abc import Mapping

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


def in_domain(collection: str, *, training: Mapping[str, str] = QWEN3_RERANKER) -> str | None:
    """Return the training set that `collection` comes from by its name, or None where none is known.

    A name proves nothing: None means "not known to be", never "clean".
    """
    name = collection.lower()
    squeezed = re.sub(r"[^a-z0-9]", "", name)
    words = set(re.findall(r"[a-z0-9]+", name))
    for spelling, training_set in training.items():
        # A short spelling ("nq", "nli") must be a word of its own, as it occurs inside many others.
        if spelling in words or (len(spelling) > 3 and spelling in squeezed):
            return training_set
    return None
