"""A collection in, recall@k and nDCG@k of both stages out.

    python eval/evaluate.py path/to/collection --model pocket --embedder pocket

The collection is a folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv. This script is the whole way in one page;
`qwen-rerank eval run` does the same with significance, examples and files to keep.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from qwen_rerank import Reranker, TwoStageRetriever
from qwen_rerank.evaluation.collection import load_beir
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.stages import first_stage


def main() -> None:
    """Read the arguments, search, rerank, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="Qwen/Qwen3-Reranker-0.6B", help="a hub name, a folder, or 'pocket'")
    parser.add_argument(
        "--embedder", default="Qwen/Qwen3-Embedding-0.6B", help="an embedder's name, 'pocket', or 'bm25'"
    )
    parser.add_argument("--top-k", type=int, default=100, help="candidates of the first stage")
    parser.add_argument("--k", type=int, default=10, help="cutoff of the measures")
    arguments = parser.parse_args()

    collection = load_beir(arguments.collection, split=arguments.split)
    with tempfile.TemporaryDirectory() as folder:
        recalling = first_stage(arguments.embedder, collection, folder=Path(folder))
        retriever = TwoStageRetriever(recalling, Reranker(arguments.model), top_k=arguments.top_k)
        queries = list(collection.queries.values())
        found = [recalling.search(query, arguments.top_k) for query in queries]
        ranked = retriever.retrieve_many(queries, top_n=arguments.top_k)

    runs = {
        "first stage": [[(hit.document.id, 0.0) for hit in hits] for hits in found],
        "reranked": [[(hit.document.id, hit.log_odds) for hit in hits] for hits in ranked],
    }
    names = (f"nDCG@{arguments.k}", f"R@{arguments.k}", f"R@{arguments.top_k}")
    print(
        f"{collection.name}: {len(collection.documents)} documents, {len(queries)} queries",
        *collection.notes,
        sep="\n  ",
    )
    print(f"{'':<12}", *(f"{name:>10}" for name in names))
    for label, lists in runs.items():
        means = measure(dict(zip(collection.queries, lists, strict=True)), collection.qrels, names).means
        print(f"{label:<12}", *(f"{means[name]:>10.4f}" for name in names))


if __name__ == "__main__":
    main()
