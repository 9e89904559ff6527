"""Both stages as an mteb task over a local collection, beside our own figures of the same runs.

    python eval/mteb_local.py path/to/collection --model pocket --embedder pocket --json eval/results/mteb.json

Needs `pip install '.[mteb]'` in a clone, no network. Ends with an error if mteb and we differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from qwen_rerank import QwenScorer, Reranker, load_embedder
from qwen_rerank.evaluation.collection import Collection, load_beir
from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.mteb import MtebCrossEncoder, MtebEncoder
from qwen_rerank.evaluation.provenance import environment
from qwen_rerank.evaluation.stages import first_stage

MEASURE = "nDCG@10"


def local_task(collection: Collection) -> AbsTaskRetrieval:
    """Return the collection as an mteb retrieval task."""

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Local{collection.name.title().replace('_', '')}",
            description=f"{collection.name} from a local folder",
            reference=None,
            dataset={"path": "local", "revision": "local"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            if self.data_loaded:
                return
            corpus = [{"id": d.id, "text": d.text, "title": ""} for d in collection.documents]
            queries = [{"id": query, "text": text} for query, text in collection.queries.items()]
            split = {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list(queries),
                "relevant_docs": collection.qrels,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return LocalTask()


def mteb_figures(collection: Collection, model: str, embedder: str, *, depth: int, folder: Path) -> dict[str, float]:
    """Return mteb's nDCG@10 of the first stage and of the reranked candidates."""
    encoder = MtebEncoder(load_embedder(embedder), name=f"local/{Path(embedder).name}")
    options: dict[str, Any] = {"cache": None, "overwrite_strategy": "always"}
    first = mteb.evaluate(encoder, local_task(collection), prediction_folder=folder, **options)
    reranking = local_task(collection).convert_to_reranking(folder, top_k=depth)
    second = mteb.evaluate(MtebCrossEncoder(QwenScorer(model), name=f"local/{Path(model).name}"), reranking, **options)
    return {
        name: float(result.task_results[0].get_score())
        for name, result in (("first stage", first), ("reranked", second))
    }


def our_figures(collection: Collection, model: str, embedder: str, *, depth: int, folder: Path) -> dict[str, float]:
    """Return our own nDCG@10 of the same."""
    found = recall(first_stage(embedder, collection, folder=folder), collection, top_k=depth).run
    scores = score_run(Reranker(model), collection, found, depth=depth)
    runs = {"first stage": found, "reranked": rerank_run(found, scores, depth=depth)}
    return {name: measure(run, collection.qrels, [MEASURE]).means[MEASURE] for name, run in runs.items()}


def main() -> None:
    """Measure twice and compare."""
    parser = argparse.ArgumentParser(description="mteb's figures beside ours, without a network.")
    parser.add_argument("collection", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--embedder", default="pocket")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--queries", type=int, help="only so many")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    collection = load_beir(arguments.collection, split=arguments.split)
    if arguments.queries:
        collection = collection.head(arguments.queries)
    with tempfile.TemporaryDirectory() as folder:
        common = {"depth": arguments.depth, "folder": Path(folder)}
        theirs = mteb_figures(collection, arguments.model, arguments.embedder, **common)
        ours = our_figures(collection, arguments.model, arguments.embedder, **common)
    print(f"{collection.name}, {len(collection.queries)} queries, {MEASURE}")
    for name in ours:
        print(f"  {name:<12} mteb {theirs[name]:.5f}   ours {ours[name]:.5f}")
    if arguments.json:
        result = {
            "collection": collection.name,
            "n_queries": len(collection.queries),
            "measure": MEASURE,
            "depth": arguments.depth,
        }
        result |= {"mteb": theirs, "ours": ours, "mteb_version": mteb.__version__, "environment": environment()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if any(abs(theirs[name] - ours[name]) > 1e-4 for name in ours):
        sys.exit("mteb and we disagree")


if __name__ == "__main__":
    main()
