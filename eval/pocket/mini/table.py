"""Write the tables of what `measure.py` and `speed.py` measured: `results.md`, and `card.md` for the model's card.

python eval/pocket/mini/table.py --results eval/pocket/mini/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
OVER = {
    "over BM25": ("bm25", "first stage"),
    "over the hybrid first stage": ("hybrid", "first stage"),
    "over the pocket reranker, BM25's candidates": ("bm25", "pocket"),
    "over the pocket reranker, hybrid candidates": ("hybrid", "pocket"),
}


def quality(report: dict[str, Any], stage: str) -> list[str]:
    """Return the table of one first stage."""
    lines = [
        f"Candidates of {stage}:",
        "",
        "| collection | questions | first stage | pocket | mini | mini over first stage | mini over pocket |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in report["rows"]:
        if (found := row.get(stage)) is None:
            continue
        gains = [
            "{:+.3f} ({:+.3f} … {:+.3f})".format(*found[key]) if key in found else ""
            for key in ("mini over first stage", "mini over pocket")
        ]
        values = [f"{found[key]:.3f}" if key in found else "" for key in ("first stage", "pocket", "mini")]
        lines.append(f"| {row['collection']} | {row['queries']} | {' | '.join(values + gains)} |")
    return [*lines, ""]


def summary(report: dict[str, Any]) -> list[str]:
    """Return the counts that the bars are about."""
    lines = ["| mini | collections | mean gain | interval above zero | below zero |", "| --- | --: | --: | --: | --: |"]
    for name, (stage, base) in OVER.items():
        gains = [row[stage][f"mini over {base}"] for row in report["rows"] if f"mini over {base}" in row.get(stage, {})]
        if gains:
            above, below = sum(low > 0 for _, low, _ in gains), sum(high < 0 for *_, high in gains)
            mean = sum(gain for gain, *_ in gains) / len(gains)
            lines.append(f"| {name} | {len(gains)} | {mean:+.3f} | {above} | {below} |")
    return [*lines, ""]


def card(report: dict[str, Any]) -> list[str]:
    """Return the table of the card: both first stages, and what the reranker adds to each."""
    stages = ("bm25", "hybrid")
    lines = [
        "| collection | BM25 | + mini | gain over BM25 | hybrid: BM25 + embedder | + mini | gain over hybrid |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    rows = [row for row in report["rows"] if all(stage in row for stage in stages)]
    for row in rows:
        cells = [row["collection"]]
        for found in (row[stage] for stage in stages):
            gain = "{:+.3f} ({:+.3f} to {:+.3f})".format(*found["mini over first stage"])
            cells += [f"{found['first stage']:.3f}", f"{found['mini']:.3f}", gain]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["mean"]
    for stage in stages if rows else ():
        before, after = (sum(row[stage][key] for row in rows) / len(rows) for key in ("first stage", "mini"))
        cells += [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
    return [*lines, f"| {' | '.join(cells)} |"]


def speed(report: dict[str, Any]) -> list[str]:
    """Return size and times."""
    loads = ", ".join(f"{name} {found['median_s']:.2f} s" for name, found in report["loading"].items())
    times = ", ".join(f"{threads} {found['median_ms']:.0f} ms" for threads, found in report["scoring"].items())
    return [
        f"Size of the pair: {report['megabytes']} MB. Load in a fresh process, Python and imports included, median of 7: {loads}. "
        f"{report['pairs']} × {report['tokens']} tokens, median of 15: {times}.",
        "",
    ]


def main() -> None:
    """Write both pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results.resolve()
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    most = max(row["queries"] for row in report["rows"])
    lines = [
        "# The shipped pair, measured" if folder == RESULTS else "# The pair that was made, measured",
        "",
        f"Its eight-bit files. nDCG@10 of the first {most} questions at most of each collection, the first 50 candidates",
        "reranked, paired 95 % intervals. `results.json` names processor, versions and the files' hashes.",
    ]
    if elsewhere := [row["collection"] for row in report["rows"] if "hybrid and embedder measured on" in row]:
        lines += [f"The hybrid rows of {', '.join(elsewhere)} were measured on another machine, which the JSON names."]
    lines += [""]
    lines += summary(report)
    for stage in ("bm25", "hybrid"):
        if any(stage in row for row in report["rows"]):
            lines += quality(report, stage)
    if (path := folder / "speed.json").exists():
        lines += speed(json.loads(path.read_text(encoding="utf-8")))
    for name, page in (("results.md", lines), ("card.md", card(report))):
        (folder / name).write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
