"""Pictures of an evaluation as SVG text, drawn from its JSON alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qwen_rerank.errors import MissingExtraError

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.evaluation.plots", package="matplotlib", extra="eval", cause=exc) from exc

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"
_COLOURS = (BLUE, "#059669", "#9333ea", ORANGE, "#0891b2", "#db2777", "#65a30d", "#b45309")
Row = Mapping[str, Any]

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "qwen-rerank",  # the same bytes for the same figure
    "svg.fonttype": "none",  # the reader's browser draws the text: it knows fonts for Chinese, and the page stays small
    "text.parse_math": False,  # a "$" in a label is a dollar
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#64748b",
    "axes.labelcolor": "#334155",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
}


def svg(figure: Figure) -> str:
    """Return the figure as an `<svg>` element, the same bytes for the same figure."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _style():
        figure.savefig(buffer, format="svg", metadata=nothing, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def quality_by_depth(outcomes: Sequence[Row], *, primary: str) -> Figure:
    """Draw the measure over the number of candidates reranked, a line for each pair of stages; dashed the first stages alone."""
    with _style():
        figure, axes = _axes("candidates reranked", primary)
        alone = {row["first_stage"]: row["means"][primary] for row in outcomes if row["reranker"] is None}
        colours = {stage: _COLOURS[place % len(_COLOURS)] for place, stage in enumerate(alone)}
        for stage, value in alone.items():
            axes.axhline(value, color=colours[stage], linestyle="--", linewidth=1, label=f"{stage} alone")
        for place, (label, rows) in enumerate(_lines(outcomes).items()):
            mark = "osD^vP"[place // max(1, len(alone)) % 6] if len(alone) > 1 else "osD^vP"[place % 6]
            axes.plot(
                [row["depth"] for row in rows],
                [row["means"][primary] for row in rows],
                marker=mark,
                markersize=5,
                color=colours[rows[0]["first_stage"]] if len(alone) > 1 else _COLOURS[(place + 1) % len(_COLOURS)],
                label=label,
            )
        _legend(axes)
    return figure


def quality_by_price(outcomes: Sequence[Row], front: Sequence[str], *, primary: str, price: str, unit: str) -> Figure:
    """Draw the measure over what a search costs; the settings on the front are joined and bear their numbers in the table."""
    with _style():
        figure, axes = _axes(unit, primary)
        axes.scatter([row[price] for row in outcomes], [row["means"][primary] for row in outcomes], color=GREY, s=18)
        numbers = {row["label"]: number for number, row in enumerate(outcomes, start=1)}
        best = sorted((row for row in outcomes if row["label"] in front), key=lambda row: row[price])
        axes.plot([row[price] for row in best], [row["means"][primary] for row in best], color=BLUE, marker="o")
        for row in best:
            axes.annotate(
                str(numbers[row["label"]]),
                (row[price], row["means"][primary]),
                xytext=(0, 6),
                textcoords="offset points",
                color=BLUE,
                weight="bold",
                ha="center",
            )
        if all(row[price] > 0 for row in outcomes):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")  # the usual one writes TeX
        axes.margins(y=0.15)
    return figure


def reliability_diagram(before: Sequence[Row], after: Sequence[Row]) -> Figure:
    """Draw promised against observed probability, before and after calibration; the diagonal is right, large dots hold many pairs."""
    with _style():
        figure, axes = _axes("promised probability", "share that is relevant", size=(4.6, 4.2))
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="right")
        for name, bins, colour in (("sigmoid", before, ORANGE), ("calibrated", after, BLUE)):
            total = sum(b["n_pairs"] for b in bins)
            x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
            axes.plot(x, y, color=colour, linewidth=1, label=name)
            axes.scatter(x, y, color=colour, s=[20 + 300 * b["n_pairs"] / total for b in bins], alpha=0.6)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        _legend(axes)
    return figure


def score_histogram(edges: Sequence[float], relevant: Sequence[int], others: Sequence[int]) -> Figure:
    """Draw how log-odds are spread among relevant and other candidates, each as shares of its own kind.

    Args:
        edges: Ends of the bins, one more than there are bins.
        relevant: Relevant candidates in each bin.
        others: Other candidates in each bin.
    """
    with _style():
        figure, axes = _axes("log-odds", "share of the kind")
        for name, counts, colour in (("not relevant or not judged", others, GREY), ("relevant", relevant, BLUE)):
            total = max(1, sum(counts))
            axes.stairs([count / total for count in counts], edges, fill=True, alpha=0.55, color=colour, label=name)
        _legend(axes)
    return figure


def query_deltas(deltas: Sequence[float], *, primary: str) -> Figure:
    """Draw what reranking changed for each query, most helped first."""
    with _style():
        figure, axes = _axes("queries, most helped first", f"change of {primary}")
        ordered = sorted(deltas, reverse=True)
        places = range(len(ordered))
        axes.bar(places, ordered, width=1.0, color=[BLUE if delta > 0 else ORANGE for delta in ordered])
        axes.axhline(0, color=GREY, linewidth=1)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # matplotlib measures text with its own font; what that lacks, the reader's browser draws all the same.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _axes(x_label: str, y_label: str, *, size: tuple[float, float] = (6.4, 3.4)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.18), borderaxespad=0.0, ncols=2)


def _lines(outcomes: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in outcomes:
        if row["reranker"] is not None:
            lines.setdefault(f"{row['first_stage']} → {row['reranker']}", []).append(row)
    return {label: sorted(rows, key=lambda row: int(row["depth"])) for label, rows in lines.items()}
