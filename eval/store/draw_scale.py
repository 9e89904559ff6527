"""The picture of a store at scale: recall against the exact answer over the time of a query, for each effort.

python eval/store/draw_scale.py eval/store/scale.json eval/store/scale.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


def main(source: str, target: str) -> None:
    """Draw the efforts of a measured store."""
    found = json.loads(Path(source).read_text(encoding="utf-8"))
    tuned = (
        found.get("tuned") or found["build"]["tuned"]
    )  # tuned while it was built, before building was a step of its own
    mpl.rcParams["svg.hashsalt"] = "scale"  # the same picture from the same figures
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([one["p50_ms"] for one in tuned], [one["recall"] for one in tuned], "o-", color="#3b6ea5")
    for one in tuned:
        label = f"{one['effort']} lists" + (", kept" if one["chosen"] else "")
        axes.annotate(label, (one["p50_ms"], one["recall"]), (6, -10), textcoords="offset points", fontsize=8)
    axes.axhline(0.95, color="#999", linewidth=0.8, linestyle="--")
    setting = found["setting"]
    measuring = setting.get("measuring")
    machine = f"{measuring['threads']} threads" if measuring else f"{setting['cores']} shared cores"
    axes.set(
        xlabel="median milliseconds of a dense query",
        ylabel="recall of the exact 100 best",
        title=f"{setting['passages']:,} passages, {found['index']}, {machine}",
    )
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
