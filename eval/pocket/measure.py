"""Measure the pocket models on test splits: BM25, the embedder alone, and the embedder with the reranker.

python eval/pocket/measure.py --data ../shared/data --output eval/pocket/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sources import TRAINED_ON

from qwen_rerank import BM25Index, QwenScorer, Reranker, load_embedder
from qwen_rerank.evaluation.collection import Collection, load_beir
from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.significance import compare
from qwen_rerank.training import EmbeddedDocuments

COLLECTIONS = {
    "scifact": "en",
    "vaswani_npl": "en",
    "cosqa": "en",
    "dbpedia_entity_subset": "en",
    "xquad_r_en": "en",
    "xquad_r_zh": "zh",
    "dureader_demo": "zh",
    "rgb_zh_dev": "zh",
}
DEPTH = 50
MEASURE = "nDCG@10"


def main() -> None:
    """Write one JSON row a collection, and the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections in BEIR layout")
    parser.add_argument("--output", type=Path, help="folder for results.json and results.md; printed alone without it")
    parser.add_argument("--embedder", default="pocket")
    parser.add_argument("--reranker", default="pocket")
    parser.add_argument("--queries", type=int, help="only the first queries of each collection, for a quick look")
    parser.add_argument("--only", nargs="*", default=list(COLLECTIONS), help="collections")
    options = parser.parse_args()
    embedder, scorer = load_embedder(options.embedder), QwenScorer(options.reranker, max_length=1024)
    rows = []
    for name in options.only:
        collection = load_beir(options.data / name)
        if options.queries:
            collection = collection.head(options.queries)
        rows.append(measure_collection(collection, embedder, Reranker(scorer)))
        print(json.dumps(rows[-1]), flush=True)
    table = markdown(rows)
    print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        (options.output / "results.md").write_text(table + "\n", encoding="utf-8")


def measure_collection(collection: Collection, embedder, reranker: Reranker) -> dict:
    """Return nDCG@10 of the three systems, and the reranker's gain over the embedder and BM25 with 95 % intervals."""
    first = recall(EmbeddedDocuments(collection.documents, embedder), collection, top_k=DEPTH, name=collection.name).run
    lexical = recall(BM25Index(collection.documents), collection, top_k=DEPTH, name="BM25").run
    scores = score_run(reranker, collection, first, depth=DEPTH, name=collection.name)
    runs = {"bm25": lexical, "embedder": first, "reranked": rerank_run(first, scores, depth=DEPTH)}
    values = {name: measure(run, collection.qrels, [MEASURE, f"R@{DEPTH}"]) for name, run in runs.items()}
    reranked = values["reranked"].per_query[MEASURE]
    row = {
        "collection": collection.name,
        "language": COLLECTIONS.get(collection.name, ""),
        "in_domain": collection.name in TRAINED_ON,
        "queries": len(collection.queries),
        f"embedder R@{DEPTH}": round(values["embedder"].means[f"R@{DEPTH}"], 4),
        **{name: round(value.means[MEASURE], 4) for name, value in values.items()},
    }
    for other in ("embedder", "bm25"):
        gain = compare(values[other].per_query[MEASURE], {"reranked": reranked})["reranked"]
        row[f"gain over {other}"] = [round(x, 4) for x in (gain.difference, gain.low, gain.high)]
    return row


def markdown(rows: list[dict]) -> str:
    """Return the table."""
    lines = [
        "| collection | language | corpus seen in training | queries | BM25 | pocket embedder | + pocket reranker |"
        " gain over embedder (95 %) | over BM25 (95 %) |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        gains = [
            f"{d:+.3f} ({low:+.3f} to {high:+.3f})"
            for d, low, high in (row["gain over embedder"], row["gain over bm25"])
        ]
        lines.append(
            f"| {row['collection']} | {row['language']} | {'yes' if row['in_domain'] else 'no'} | {row['queries']} | "
            f"{row['bm25']:.3f} | {row['embedder']:.3f} | {row['reranked']:.3f} | {gains[0]} | {gains[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
