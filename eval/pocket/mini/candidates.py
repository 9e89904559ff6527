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
from pathlib import Path

from qwen_rerank import BM25Index, load_embedder
from qwen_rerank.evaluation.collection import load_beir
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


def main() -> None:
    """Write the file and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    embedder = load_embedder("pocket")
    rows = []
    for role, spec, language in roles():
        name, _, split = spec.partition(":")
        collection = load_beir(options.data / name, split=split or "test").head(
            QUERIES if role == "measured" else FEWER
        )
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
