"""Does reranking help on your documents? Your labels in, both stages' figures with their uncertainty out.

    python examples/evaluate_your_corpus.py
    python examples/evaluate_your_corpus.py --documents my-folder --labels labels.jsonl --model Qwen/Qwen3-Reranker-0.6B

A label is one line of JSON: {"query": "when does the lease end", "relevant": ["contracts/lease.md"]}; the ids are those that
`qwen-rerank search` prints. Without arguments the shipped sentences of Wikipedia are searched, with their 60 questions. 'mini', the default, is a small model that ships with the package; it is not Qwen3-Reranker.

Needs, in a clone: pip install '.[eval]', and the extra `local` for models of the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_rerank import BM25Index, Reranker
from qwen_rerank.evaluation.collection import Collection, load_pairs
from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.significance import compare
from qwen_rerank.folders import read_files
from qwen_rerank.samples import load_encyclopedia

MEASURES = ("nDCG@10", "RR@10", "R@20", "R@100")


def main() -> None:
    """Search every labelled query, rerank at several depths, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, help="folder or file of documents")
    parser.add_argument("--labels", type=Path, help="JSON lines with query and relevant")
    parser.add_argument("--model", default="mini", help="reranker: a hub name, a folder, or 'mini'")
    parser.add_argument("--depths", type=int, nargs="+", default=[5, 10, 20], help="candidates to rerank")
    arguments = parser.parse_args()
    if (arguments.documents is None) != (arguments.labels is None):
        parser.error("--documents and --labels belong together")

    collection = shipped() if arguments.labels is None else labelled(arguments.documents, arguments.labels)
    print(f"{collection.name}: {len(collection.documents)} documents, {len(collection.queries)} questions")
    for note in collection.notes:
        print(f"  {note}")

    found = recall(BM25Index(collection.documents), collection, top_k=100)
    scores = score_run(Reranker(arguments.model), collection, found.run, depth=max(arguments.depths))
    runs = {f"{arguments.model} @{depth}": rerank_run(found.run, scores, depth=depth) for depth in arguments.depths}
    measured = {name: measure(run, collection.qrels, MEASURES) for name, run in {"bm25": found.run, **runs}.items()}

    values = {name: result.per_query["nDCG@10"] for name, result in measured.items()}
    compared = compare(values["bm25"], {name: values[name] for name in runs})
    print(f"\n{'':<14}" + "".join(f"{name:>9}" for name in MEASURES) + "   change of nDCG@10 (95 %)   p (Holm)  +/-")
    for name, result in measured.items():
        line = f"{name:<14}" + "".join(f"{result.means[one]:>9.3f}" for one in MEASURES)
        if name in compared:
            c = compared[name]
            line += f"   {c.difference:+.3f} ({c.low:+.3f} … {c.high:+.3f})   {c.p_corrected:8.4f}  {c.wins}/{c.losses}"
        print(line)
    print("\nAn interval that holds 0 means: these questions cannot tell. Label more before you decide.")


def labelled(documents: Path, labels: Path) -> Collection:
    """Return your documents with your labels."""
    reading = read_files([documents])
    for skipped in reading.skipped:
        print(f"skipped {skipped.where}: {skipped.reason}")
    return load_pairs(labels, reading.documents)


def shipped() -> Collection:
    """Return the shipped English sentences with their questions."""
    sample = load_encyclopedia("en")
    queries = {f"q{i}": question for i, question in enumerate(sample.relevant)}
    qrels = {query: {sample.relevant[text]: 1} for query, text in queries.items()}
    return Collection("shipped sentences", "test", sample.documents, queries, qrels)


if __name__ == "__main__":
    main()
