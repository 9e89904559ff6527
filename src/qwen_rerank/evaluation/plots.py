"""Pictures of an evaluation as SVG text, drawn from its JSON alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_rerank.errors import MissingExtraError

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.evaluation.plots", package="matplotlib", extra="eval", cause=exc) from exc

_BLUE, _ORANGE, _GREY = "#2563eb", "#ea580c", "#94a3b8"
Row = Mapping[str, Any]


def svg(figure: Figure) -> str:
    """Return the figure as an `<svg>` element, the same bytes for the same figure."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "qwen-rerank", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def quality_by_depth(outcomes: Sequence[Row], *, primary: str) -> Figure:
    """Draw the measure over the number of candidates reranked, a line for each pair of stages."""
    figure, axes = _axes("candidates reranked", primary)
    for label, rows in _lines(outcomes).items():
        axes.plot([r["depth"] for r in rows], [r["means"][primary] for r in rows], marker="o", label=label)
    for row in outcomes:
        if row["reranker"] is None:
            axes.axhline(row["means"][primary], color=_GREY, linestyle="--", linewidth=1)
            axes.annotate(
                row["first_stage"], (1, row["means"][primary]), xycoords=("axes fraction", "data"), fontsize=8
            )
    axes.legend(fontsize=8)
    return figure


def quality_by_price(outcomes: Sequence[Row], front: Sequence[str], *, primary: str, price: str, unit: str) -> Figure:
    """Draw the measure over what a search costs; the settings on the Pareto front are joined and named."""
    figure, axes = _axes(unit, primary)
    axes.scatter([r[price] for r in outcomes], [r["means"][primary] for r in outcomes], color=_GREY)
    best = sorted((r for r in outcomes if r["label"] in front), key=lambda r: r[price])
    axes.plot([r[price] for r in best], [r["means"][primary] for r in best], color=_BLUE, marker="o")
    for row in best:
        axes.annotate(
            row["label"], (row[price], row["means"][primary]), fontsize=7, xytext=(4, -9), textcoords="offset points"
        )
    axes.set_xscale("log")
    return figure


def reliability_diagram(before: Sequence[Row], after: Sequence[Row]) -> Figure:
    """Draw promised against observed probability, before and after calibration; the diagonal is right."""
    figure, axes = _axes("promised probability", "share that is relevant")
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1)
    for name, bins, color in (("sigmoid", before, _ORANGE), ("calibrated", after, _BLUE)):
        axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], marker="o", color=color, label=name)
    axes.legend(fontsize=8)
    return figure


def score_histogram(relevant: Sequence[float], others: Sequence[float]) -> Figure:
    """Draw how log-odds are spread among relevant and other candidates."""
    figure, axes = _axes("log-odds", "share of candidates")
    for name, values, color in (("not relevant or not judged", others, _GREY), ("relevant", relevant, _BLUE)):
        axes.hist(values, bins=40, density=True, alpha=0.6, color=color, label=name)
    axes.legend(fontsize=8)
    return figure


def query_deltas(deltas: Sequence[float], *, primary: str) -> Figure:
    """Draw what reranking changed for each query, most helped first."""
    figure, axes = _axes("queries", f"change of {primary}")
    ordered = sorted(deltas, reverse=True)
    axes.bar(range(len(ordered)), ordered, width=1.0, color=[_BLUE if d > 0 else _ORANGE for d in ordered])
    axes.axhline(0, color=_GREY, linewidth=1)
    return figure


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    return figure, axes


def _lines(outcomes: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in outcomes:
        if row["reranker"] is not None:
            lines.setdefault(f"{row['first_stage']} → {row['reranker']}", []).append(row)
    return {label: sorted(rows, key=lambda r: int(r["depth"])) for label, rows in lines.items()}
