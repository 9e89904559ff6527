"""Write what a reranker is measured on: each collection's texts, queries, judgements, and the first 50 of two first stages.

    python eval/pocket/mini/candidates.py --data COLLECTIONS --output build/mini/candidates.json.xz

The file travels to the machine that trains. `MEASURED` are the collections that figures are published for, `CHOSEN_ON`
those by which recipes are compared: no query of either is trained on. The teachers' weights are chosen on `CHOSEN_ON` and on
`TEACHERS_ON`, training queries that no teacher of ours learned from.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from dataclasses import replace
from pathlib import Path

from qwen_rerank import BM25Index, load_embedder
from qwen_rerank.evaluation.collection import Collection, load_beir
from qwen_rerank.evaluation.experiment import recall
from qwen_rerank.training import EmbeddedDocuments

MEASURED = {
    "scifact": "en",
    "vaswani_npl": "en",
    "cosqa": "en",
    "dbpedia_entity_subset": "en",
    "xquad_r_en": "en",
    "xquad_r_zh": "zh",
    "dureader_demo": "zh",
    "rgb_zh_dev": "zh",
}
CHOSEN_ON = {"cosqa:dev": "en", "cacm": "en", "cisi": "en", "noveleval": "en", "drcd": "zh", "cmrc2018": "zh"}
TEACHERS_ON = {"scifact:train": "en", "dureader_demo:train": "zh"}
QUERIES, FEWER, DEPTH, CHARACTERS = 400, 150, 50, 2000


def roles() -> list[tuple[str, str, str]]:
    """Return (role, collection and split, language) of all collections."""
    sets = {"measured": MEASURED, "chosen": CHOSEN_ON, "teachers": TEACHERS_ON}
    return [(role, spec, language) for role, specs in sets.items() for spec, language in specs.items()]


def measured(folder: Path, split: str, *, queries: int, scale: float) -> Collection:
    """Return the first queries of a collection; below a `scale` of 1 fewer of them, and few documents."""
    collection = load_beir(folder, split=split)
    collection = collection.head(min(queries, max(12, math.ceil(scale * queries))))
    if scale == 1:
        return collection
    first = max(12, math.ceil(scale * len(collection.documents)))
    kept = {document.id for document in collection.documents[:first]}
    qrels = {}
    for query, grades in collection.qrels.items():
        right = [document for document, grade in grades.items() if grade > 0][:3]
        kept.update(right)
        qrels[query] = {document: grades[document] for document in right}
    documents = [document for document in collection.documents if document.id in kept]
    return replace(collection, documents=documents, qrels=qrels)


def main() -> None:
    """Write the file and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="share of queries and documents, for a rehearsal")
    options = parser.parse_args()
    embedder = load_embedder("pocket")
    rows = []
    for role, spec, language in roles():
        name, _, split = spec.partition(":")
        queries = QUERIES if role == "measured" else FEWER
        collection = measured(options.data / name, split or "test", queries=queries, scale=options.scale)
        place = {document.id: i for i, document in enumerate(collection.documents)}
        stages = {"bm25": BM25Index(collection.documents), "pocket": EmbeddedDocuments(collection.documents, embedder)}
        runs = {stage: recall(index, collection, top_k=DEPTH, name=stage).run for stage, index in stages.items()}
        rows.append(
            {
                "name": spec,
                "language": language,
                "role": role,
                "documents": [document.text[:CHARACTERS] for document in collection.documents],
                "queries": dict(collection.queries),
                "qrels": {q: {place[d]: g for d, g in grades.items()} for q, grades in collection.qrels.items()},
                "runs": {
                    stage: {q: [[place[d], round(float(s), 4)] for d, s in hits] for q, hits in run.items()}
                    for stage, run in runs.items()
                },
            }
        )
        print(spec, len(collection.documents), len(collection.queries), flush=True)
    with lzma.open(options.output, "wt", encoding="utf-8", preset=6) as file:
        json.dump(rows, file, ensure_ascii=False)


if __name__ == "__main__":
    main()
