"""Make what the demo says of itself: the count over all questions, and the cases that it shows.

    python eval/demo.py

Asks the 120 questions of the shipped encyclopedia with the demo's own pair and writes
`src/qwen_rerank/samples/encyclopedia.results.json`: in how many the right passage comes first before and after the second
round, how many came there and how many left it, and for each language the three questions whose right passage rose the
farthest to the first place, each of another article, and after them the one where it fell the farthest (where none fell, the
one that was left the lowest). Under `bm25` the same behind BM25 alone, for the playground.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from qwen_rerank import BM25Index, Reranker, TwoStageRetriever
from qwen_rerank.cli.demo import DEMO_EMBEDDER, DEMO_MODEL, TOP_K, count_first, retrievers, right_places
from qwen_rerank.samples import LANGUAGES, Sample, load_encyclopedia

TARGET = Path(__file__).resolve().parents[1] / "src/qwen_rerank/samples/encyclopedia.results.json"


def cases(places: dict[str, tuple[int | None, int | None]], sample: Sample) -> list[str]:
    """Return the questions that are shown."""
    ranks = {text: (before, after) for text, (before, after) in places.items() if before and after}
    rising = sorted(
        (text for text, (before, after) in ranks.items() if after == 1 < before), key=lambda t: -ranks[t][0]
    )
    chosen: dict[str, str] = {}
    for text in rising:
        chosen.setdefault(sample.relevant[text].split("p")[0], text)
    worst = min(ranks, key=lambda text: (ranks[text][0] - ranks[text][1], -ranks[text][1]))
    return [*list(chosen.values())[:3], worst]


def main() -> None:
    """Ask all questions and write the file."""
    report = {
        "command": "python eval/demo.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": DEMO_MODEL,
        "embedder": DEMO_EMBEDDER,
        "top_k": TOP_K,
        "counts": {},
        "cases": {},
        "bm25": {"counts": {}, "cases": {}},
    }
    with retrievers(DEMO_MODEL, DEMO_EMBEDDER) as lines:
        reranker = Reranker(DEMO_MODEL)
        for language in LANGUAGES:
            sample = load_encyclopedia(language)
            by_words = TwoStageRetriever(BM25Index(sample.documents), reranker, top_k=TOP_K, top_n=TOP_K)
            for found, line in ((report, lines[language]), (report["bm25"], by_words)):
                places = right_places(line, sample)
                found["counts"][language] = count_first(places)
                found["cases"][language] = cases(places, sample)
    TARGET.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
