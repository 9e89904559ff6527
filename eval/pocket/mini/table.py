"""Write `results/results.md`, the tables of what `measure.py` and `speed.py` measured.

python eval/pocket/mini/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
    """Write the page."""
    report = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
    most = max(row["queries"] for row in report["rows"])
    lines = [
        "# The shipped pair, measured",
        "",
        f"The eight-bit files that ship. nDCG@10 of the first {most} questions at most of each collection, the first 50 candidates",
        "reranked, paired 95 % intervals. `results.json` names processor, versions and the files' hashes.",
    ]
    if not any("hybrid" in row for row in report["rows"]):
        lines += [
            "The hybrid first stage is not in it: `training.json` has it for the weights before they were made eight bits."
        ]
    lines += [""]
    lines += summary(report)
    for stage in ("bm25", "hybrid"):
        if any(stage in row for row in report["rows"]):
            lines += quality(report, stage)
    if (path := RESULTS / "speed.json").exists():
        lines += speed(json.loads(path.read_text(encoding="utf-8")))
    (RESULTS / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
