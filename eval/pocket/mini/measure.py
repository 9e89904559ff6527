"""Measure the shipped files, or those of `--model`, on test splits: BM25, hybrid search, and what mini makes of their first 50.

    python eval/pocket/mini/measure.py --data COLLECTIONS --cache build/mini/scores --output eval/pocket/mini/results

Scores are kept in `--cache`, so a run that was stopped, or one over more queries, goes on where the last one ended; results
are written after every collection. The embedder reads whole corpora, which takes an hour on two cores: `--stages bm25`
leaves it out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from candidates import DEPTH, MEASURED, QUERIES, measured

import qwen_rerank
from qwen_rerank import BM25Index, CrossEncoderScorer, QwenScorer, load_embedder
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.evaluation.experiment import fuse, recall, rerank_run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.provenance import environment
from qwen_rerank.evaluation.significance import compare

MEASURE = "nDCG@10"
SHIPPED = Path(qwen_rerank.__file__).parent / "mini"


class Kept:
    """Scores of pairs, kept in one JSON file a collection."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.scores: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def fill(self, collection: Collection, run: dict, score) -> None:
        """Score what is missing of a run's pairs, and write the file every 20 queries."""
        texts = {document.id: document.text for document in collection.documents}
        for n, (query, hits) in enumerate(run.items()):
            have = self.scores.setdefault(query, {})
            missing = [d for d, _ in hits if d not in have]
            if missing:
                values = score(collection.queries[query], [texts[d] for d in missing])
                have.update(zip(missing, map(float, values), strict=True))
            if n % 20 == 19:
                self._write()
        self._write()

    def _write(self) -> None:
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.scores))
        os.replace(unfinished, self._path)


def kept_for(collection: Collection, files: dict[str, str], folder: Path) -> Path:
    """Return the folder for what these files say of these documents; another model's scores, or other texts', are not theirs."""
    texts = [[document.id, document.text] for document in collection.documents]
    key = json.dumps([files, onnxruntime.__version__, texts])
    cache = folder / hashlib.sha256(key.encode()).hexdigest()[:12]
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def hybrid(collection: Collection, lexical: dict, embedder, cache: Path) -> tuple[dict, dict]:
    """Return the embedder's run and its reciprocal rank fusion with BM25's."""
    path = cache / f"{collection.name}.npy"
    if not path.exists():
        unfinished = cache / "vectors.unfinished.npy"
        np.save(unfinished, embedder.embed_documents([document.text for document in collection.documents]))
        os.replace(unfinished, path)
    vectors, dense = np.load(path), {}
    for query, asked in zip(collection.queries, embedder.embed_queries(list(collection.queries.values())), strict=True):
        alike = vectors @ asked
        best = np.argsort(-alike, kind="stable")[:DEPTH]
        dense[query] = [(collection.documents[i].id, float(alike[i])) for i in best]
    return dense, fuse([lexical, dense], collection, top_k=DEPTH)


def row_of(collection: Collection, runs: dict[str, dict], scores: dict[str, Kept]) -> dict:
    """Return nDCG@10 of first stages and of what each reranker makes of them, with gains and 95 % intervals."""
    row: dict = {"collection": collection.name, "queries": len(collection.queries)}
    for stage, run in runs.items():
        values = {"first stage": measure(run, collection.qrels, [MEASURE, f"R@{DEPTH}"])}
        for name, kept in scores.items():
            ranked = rerank_run(run, kept.scores, depth=DEPTH)
            values[name] = measure(ranked, collection.qrels, [MEASURE])
        per_query = {name: value.per_query[MEASURE] for name, value in values.items()}
        row[stage] = {name: round(value.means[MEASURE], 4) for name, value in values.items()}
        row[stage][f"R@{DEPTH}"] = round(values["first stage"].means[f"R@{DEPTH}"], 4)
        for base in ("first stage", "pocket"):
            if base in per_query and "mini" in per_query:
                found = compare(per_query[base], {"mini": per_query["mini"]})["mini"]
                row[stage][f"mini over {base}"] = [round(x, 4) for x in (found.difference, found.low, found.high)]
    return row


def main() -> None:
    """Measure, and write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of a pair; the shipped one without it")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--only", nargs="*", default=list(MEASURED))
    parser.add_argument("--stages", nargs="*", default=["bm25", "hybrid"], choices=["bm25", "hybrid"])
    parser.add_argument("--pocket", action="store_true", help="the pocket reranker on the same candidates too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="share of queries and documents, for a rehearsal")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(options.model.iterdir())}
    reranker = CrossEncoderScorer(str(options.model), backend="onnx", threads=options.threads)
    embedder = load_embedder(str(options.model)) if "hybrid" in options.stages else None
    pocket = QwenScorer("pocket", max_length=1024) if options.pocket else None
    report = {
        **environment(),
        "onnxruntime": onnxruntime.__version__,
        "threads": options.threads,
        "files": files,
        "rows": [],
    }
    for name in options.only:
        collection = measured(options.data / name, "test", queries=options.queries, scale=options.scale)
        cache = kept_for(collection, files, options.cache)
        lexical = recall(BM25Index(collection.documents), collection, top_k=DEPTH, name="bm25").run
        runs = {"bm25": lexical}
        if embedder is not None:
            runs["embedder"], runs["hybrid"] = hybrid(collection, lexical, embedder, cache)
        scores = {"mini": Kept(cache / f"{name}.mini.json")}
        if pocket is not None:
            scores["pocket"] = Kept(cache / f"{name}.pocket.json")
        for stage, run in runs.items():
            if stage != "embedder":
                scores["mini"].fill(collection, run, reranker.score)
                if pocket is not None:
                    scores["pocket"].fill(collection, run, pocket.score)
        row = row_of(collection, {s: r for s, r in runs.items() if s != "embedder"}, scores)
        if embedder is not None:
            row["embedder"] = round(measure(runs["embedder"], collection.qrels, [MEASURE]).means[MEASURE], 4)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        (options.output / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
