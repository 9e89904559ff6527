"""Hybrid recall against its two halves, on collections of 3,000 documents or more; the fusion is fitted on train splits.

python eval/store/hybrid.py --data ../shared/data > eval/store/hybrid.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from passages import read_collection

from qwen_rerank import FaissStore, load_embedder
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.fusion import fuse_ranks

TEST = ("cacm", "cosqa", "dbpedia_entity_subset", "rgb_zh_dev", "scifact", "vaswani_npl")
FIT = (("cmrc2018", "train"), ("cosqa", "dev"), ("drcd", "train"), ("dureader_demo", "train"), ("scifact", "train"))
MEASURES = ("nDCG@10", "R@100")
DEPTH = 200
KS = (1, 2, 3, 5, 10, 20, 40, 60)
RESAMPLES = 5000

Ranking = list[str]
Halves = dict[str, tuple[Ranking, Ranking]]  # query id → ids that dense and lexical recall give


def halves(data: Path, name: str, split: str, embedder: str) -> tuple[Halves, dict[str, dict[str, int]]]:
    """Return what each half recalls for every query of a split, and the judgements."""
    documents, queries, qrels = read_collection(data / name, split)
    with tempfile.TemporaryDirectory() as folder, FaissStore.create(folder, load_embedder(embedder)) as store:
        store.add(documents)
        ids = list(qrels)
        texts = [queries[query] for query in ids]
        found = {mode: store.search_many(texts, DEPTH, mode=mode) for mode in ("dense", "lexical")}
    both = zip(found["dense"], found["lexical"], strict=True)
    named = (([hit.document.id for hit in dense], [hit.document.id for hit in lexical]) for dense, lexical in both)
    return dict(zip(ids, named, strict=True)), qrels


def fused(pairs: Halves, *, k: int) -> dict[str, Ranking]:
    """Return the fusion of both halves for every query, both with the same weight."""
    return {query: [id for id, _ in fuse_ranks(pair, k=k)] for query, pair in pairs.items()}


def values(run: dict[str, Ranking], qrels: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
    """Return each measure of every query."""
    ranked = {query: [(id, -float(rank)) for rank, id in enumerate(ids)] for query, ids in run.items()}
    table = measure(ranked, qrels, MEASURES).per_query
    return {name: np.array([table[name][query] for query in sorted(qrels)]) for name in MEASURES}


def fit(data: Path, embedder: str) -> dict[str, Any]:
    """Return the fusion with the best mean of both measures over the train splits, and all that were tried."""
    splits = [halves(data, name, split, embedder) for name, split in FIT]
    tried = []
    for k in KS:
        found = [values(fused(pairs, k=k), qrels) for pairs, qrels in splits]
        tried.append({"k": k, **{name: float(np.mean([one[name].mean() for one in found])) for name in MEASURES}})
    best = max(tried, key=lambda one: one["nDCG@10"] + one["R@100"])
    return {"splits": [f"{name} {split}" for name, split in FIT], "best": best, "tried": tried}


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> dict[str, float]:
    """Return the mean difference over collections with its paired 95 % interval; queries are drawn within each."""
    rng = np.random.default_rng(0)
    differences = [one - other for one, other in zip(a, b, strict=True)]
    drawn = np.mean(
        [one[rng.integers(len(one), size=(RESAMPLES, len(one)))].mean(axis=1) for one in differences], axis=0
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(np.mean([one.mean() for one in differences])), "low": float(low), "high": float(high)}


def main() -> None:
    """Fit on train splits, measure on test splits, print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embedder", default="pocket")
    arguments = parser.parse_args()
    fitted = fit(arguments.data, arguments.embedder)
    ways: dict[str, list[dict[str, np.ndarray]]] = {
        "dense": [],
        "lexical": [],
        "hybrid, k=60": [],
        "hybrid, fitted": [],
    }
    for name in TEST:
        pairs, qrels = halves(arguments.data, name, "test", arguments.embedder)
        ways["dense"].append(values({query: pair[0][:100] for query, pair in pairs.items()}, qrels))
        ways["lexical"].append(values({query: pair[1][:100] for query, pair in pairs.items()}, qrels))
        ways["hybrid, k=60"].append(values(fused(pairs, k=60), qrels))
        ways["hybrid, fitted"].append(values(fused(pairs, k=fitted["best"]["k"]), qrels))
    means = {
        way: {
            measure: {
                "mean": float(np.mean([one[measure].mean() for one in found])),
                **{name: float(one[measure].mean()) for name, one in zip(TEST, found, strict=True)},
            }
            for measure in MEASURES
        }
        for way, found in ways.items()
    }
    against = {
        f"{way} − {half}": {
            measure: difference([one[measure] for one in ways[way]], [one[measure] for one in ways[half]])
            for measure in MEASURES
        }
        for way in ("hybrid, k=60", "hybrid, fitted")
        for half in ("dense", "lexical")
    }
    print(
        json.dumps({"embedder": arguments.embedder, "fitted": fitted, "means": means, "differences": against}, indent=1)
    )


if __name__ == "__main__":
    main()
