"""Make what the demo says of itself: the count over all questions, and the cases that it shows.

    python eval/demo.py

Asks the 120 questions of the shipped encyclopedia with the demo's own pair and writes
`src/qwen_rerank/samples/encyclopedia.results.json`: in how many the right passage comes first before and after the second
round, and for each language the three questions whose right passage rose the farthest to the first place, each of another
article, and after them the one where it fell the farthest.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from qwen_rerank.cli.demo import DEMO_EMBEDDER, DEMO_MODEL, TOP_K, count_right, retrievers
from qwen_rerank.pipeline import TwoStageRetriever
from qwen_rerank.samples import LANGUAGES, Sample, load_encyclopedia

TARGET = Path(__file__).resolve().parents[1] / "src/qwen_rerank/samples/encyclopedia.results.json"


def places(line: TwoStageRetriever, sample: Sample) -> dict[str, tuple[int, int]]:
    """Return for each question the right passage's rank before and after; questions that do not recall it are left out."""
    found = {}
    for text, right in sample.relevant.items():
        rounds = line.retrieve_rounds(text)
        before = {candidate.document.id: candidate.rank for candidate in rounds.candidates}
        after = {hit.document.id: hit.rank for hit in rounds.ranked}
        if right in before:
            found[text] = (before[right], after[right])
    return found


def cases(ranks: dict[str, tuple[int, int]], sample: Sample) -> list[str]:
    """Return the questions that are shown."""
    rising = sorted(
        (text for text, (before, after) in ranks.items() if after == 1 < before), key=lambda t: -ranks[t][0]
    )
    chosen: dict[str, str] = {}
    for text in rising:
        chosen.setdefault(sample.relevant[text].split("p")[0], text)
    worst = min(ranks, key=lambda text: ranks[text][0] - ranks[text][1])
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
    }
    with retrievers(DEMO_MODEL, DEMO_EMBEDDER) as lines:
        for language in LANGUAGES:
            sample = load_encyclopedia(language)
            report["counts"][language] = count_right(lines[language], sample)
            report["cases"][language] = cases(places(lines[language], sample), sample)
    TARGET.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
