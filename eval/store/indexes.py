"""Kinds of FAISS indexes side by side: time to build, memory, and time of a search over recall of the exact 100 best.

python eval/store/indexes.py build/scale > eval/store/indexes.json

The folder is the one that `scale.py embed` fills. All are FAISS alone, one query at a time; those that keep fewer bits rank
their candidates by the whole vectors.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from scale import TOP_K, conditions, milliseconds, say, timed

from qwen_rerank import load_embedder
from qwen_rerank.store.index import VectorIndex, planned

LEAST = 0.95  # recall that an index must reach
EF_CONSTRUCTION = 80
AUTO = 1_000_000  # vectors for which the store builds a graph


def graph(kind: str, vectors: np.ndarray) -> Any:
    """Return an HNSW index of vectors."""
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    inner = faiss.downcast_index(index.base_index) if kind.endswith("RFlat") else index
    inner.hnsw.efConstruction = EF_CONSTRUCTION
    index.train(vectors[::10])
    index.add(vectors)
    return index


def lists(kind: str, vectors: np.ndarray) -> Any:
    """Return an index of lists as the store builds it."""
    made = VectorIndex(faiss, kind, vectors.shape[1])
    made.start(len(vectors), lambda count: vectors[:: len(vectors) // count][:count])
    made.add(np.arange(1, len(vectors) + 1), vectors)
    return faiss.clone_index(made._base)  # which goes with `made`


def parameters(kind: str, effort: int) -> Any:
    """Return FAISS's parameters of a search."""
    made = (
        faiss.SearchParametersHNSW(efSearch=effort)
        if kind.startswith("HNSW")
        else faiss.SearchParametersIVF(nprobe=effort)
    )
    return faiss.IndexRefineSearchParameters(k_factor=1.25, base_index_params=made) if "RFlat" in kind else made


def main() -> None:
    """Measure all kinds and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--passages", type=int, default=100_000)
    arguments = parser.parse_args()
    vectors = np.load(arguments.folder / "vectors.npy", mmap_mode="r")
    vectors = np.ascontiguousarray(vectors[:: max(1, len(vectors) // arguments.passages)][: arguments.passages])
    texts = json.loads((arguments.folder / "asked.json").read_text(encoding="utf-8"))
    asked = load_embedder("pocket").embed_queries(texts)
    asked = np.ascontiguousarray(asked[asked.any(axis=1)])
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    exact = [set(found.tolist()) for found in flat.search(asked, TOP_K)[1]]
    result: dict[str, Any] = {"setting": {"passages": len(vectors), "queries": len(asked), **conditions()}}
    n_lists = 2 ** round(math.log2(4 * math.sqrt(len(vectors))))
    for kind in (f"IVF{n_lists},SQ8,RFlat", "HNSW32", planned("auto", AUTO)):
        seconds, index = timed(lambda k=kind: (graph if k.startswith("HNSW") else lists)(k, vectors))
        size = faiss.serialize_index(index).nbytes / 1e6
        found = {"build_s": round(seconds, 1), "mb": round(size), "efforts": []}
        for effort in (128, 181, 256, 362, 512, 724, 1024):
            options = parameters(kind, effort)
            best = [index.search(one[None], TOP_K, params=options)[1][0] for one in asked]
            share = float(np.mean([len(wanted & {*rows.tolist()}) for wanted, rows in zip(exact, best, strict=True)]))
            times = milliseconds(lambda n, i=index, o=options: i.search(asked[n : n + 1], TOP_K, params=o), len(asked))
            found["efforts"].append({"effort": effort, "recall": round(share / TOP_K, 4), **times})
            if share / TOP_K >= LEAST:
                break
        result[kind] = found
        say(kind, found)
    result["setting"]["load_after"] = conditions()["load"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
