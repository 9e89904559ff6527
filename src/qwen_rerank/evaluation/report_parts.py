"""The parts of a report: one function for each kind of result gives its HTML, everything from the outside escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from qwen_rerank.evaluation import plots
from qwen_rerank.evaluation.results import threshold_sentence
from qwen_rerank.evaluation.sweep import money

Row = Mapping[str, Any]
Cell = str | tuple[str, str]
"""Text, or (address within the page, text)."""


def run_section(result: Row) -> str:
    """Return the systems of a run, what changed for each query, and the queries that changed most."""
    names = list(result["measures"])
    means: list[list[Cell]] = [
        [row["label"], *(f"{row['means'][name]:.3f}" for name in names)] for row in result["systems"]
    ]
    changes: list[list[Cell]] = [
        [row["label"], *_difference(row["comparison"])] for row in result["systems"] if row["comparison"] is not None
    ]
    head = [
        f"against {result['systems'][0]['label']}",
        f"Δ {result['primary']}",
        "95 % interval",
        "p (Holm)",
        "queries better / worse / same",
    ]
    pictures = [
        figure(
            plots.query_deltas(row["deltas"], primary=result["primary"]),
            f"{row['label']}: what changed against {result['systems'][0]['label']}, query by query",
        )
        for row in result["systems"]
        if row["comparison"] is not None
    ]
    if result["scores"] is not None:
        caption = "Scores of relevant and of other candidates: the less they overlap, the better a threshold can work"
        pictures.append(figure(plots.score_histogram(**result["scores"]), caption))
    moves = "".join(
        _moves(f"Most {kind} by {result['examples_of']}", result[kind], result["primary"])
        for kind in ("helped", "hurt")
    )
    tables = table(["system", *names], means) + (table(head, changes) if changes else "")
    return f"<h3>Both stages</h3>{tables}{_pictures(pictures)}{moves}"


def _difference(c: Row) -> list[str]:
    return [
        f"{c['difference']:+.3f}",
        f"{c['low']:+.3f} … {c['high']:+.3f}",
        f"{c['p_corrected']:.4f}",
        f"{c['wins']} / {c['losses']} / {c['ties']}",
    ]


def _moves(title: str, moves: Sequence[Row], primary: str) -> str:
    if not moves:
        return ""
    rows: list[list[Cell]] = [
        [
            move["query"],
            f"{move['before']:.2f} → {move['after']:.2f}",
            f"{_rank(move['relevant_before'])} → {_rank(move['relevant_after'])}",
            move["top_before"],
            move["top_after"],
        ]
        for move in moves
    ]
    head = ["query", primary, "best relevant rank", "first before", "first after"]
    body = table(head, rows, text={0, 3, 4}, wide={0, 3, 4})
    return f"<details><summary>{escape(title)}: {len(moves)} queries with texts</summary>{body}</details>"


def _rank(rank: int | None) -> str:
    return "none" if rank is None else str(rank)


def sweep_section(result: Row) -> str:
    """Return the recommendation, every setting, and the pictures of quality against depth, time and money."""
    primary = result["primary"]
    others = [name for name in result["measures"] if name != primary]
    priced = result["outcomes"][0]["cost"] is not None
    head = ["", "setting", primary, "p50 ms", "p95 ms", *(["cost of 1,000"] if priced else []), *others]
    rows: list[list[Cell]] = [
        [
            f"{number}{' ★' if row['label'] in result['front'] else ''}",
            row["label"],
            f"{row['means'][primary]:.3f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            *([money(row["cost"])] if priced else []),
            *(f"{row['means'][name]:.3f}" for name in others),
        ]
        for number, row in enumerate(result["outcomes"], start=1)
    ]
    chosen = {place for place, row in enumerate(result["outcomes"]) if row["label"] == result["recommended"]}
    return (
        f'<h3>Which setting?</h3><p class="say">{escape(result["recommendation"])}</p>'
        f"{table(head, rows, text={1}, chosen=chosen)}{_pictures(_sweep_pictures(result, priced))}"
    )


def _sweep_pictures(result: Row, priced: bool) -> list[str]:
    outcomes, primary = result["outcomes"], result["primary"]
    by_time = plots.quality_by_price(
        outcomes, result["front"], primary=primary, price="p95_ms", unit="milliseconds a search, 95th percentile"
    )
    pictures = [
        figure(plots.quality_by_depth(outcomes, primary=primary), "Quality by depth"),
        figure(by_time, "Quality by time. On the line (★): nothing is better and as fast; the numbers are the table's"),
    ]
    if priced:
        by_cost = plots.quality_by_price(
            outcomes, result["front_by_cost"], primary=primary, price="cost", unit="cost of 1,000 searches"
        )
        pictures.append(figure(by_cost, "Quality by cost. On the line: nothing is better and as cheap"))
    return pictures


def calibration_section(result: Row) -> str:
    """Return how far promised and observed probabilities lie apart, before and after, and the threshold."""
    rows: list[list[Cell]] = [
        [name, f"{result[name]['ece']:.4f}", f"{result[name]['brier']:.4f}"] for name in ("sigmoid", "calibrated")
    ]
    say = "" if result["threshold"] is None else f'<p class="say">{escape(threshold_sentence(result["threshold"]))}</p>'
    diagram = plots.reliability_diagram(result["sigmoid"]["bins"], result["calibrated"]["bins"])
    caption = "Promise and truth on queries that the fit had not seen; large dots hold many pairs"
    facts = f"{result['n_pairs']:,} pairs, {result['n_relevant']:,} of them relevant."
    return (
        f'<h3>What a score is worth</h3>{say}<p class="facts">{facts} Both errors are 0 at best.</p>'
        f"{table(['probability', 'calibration error', 'Brier score'], rows)}{_pictures([figure(diagram, caption)])}"
    )


SECTIONS: dict[str, Callable[[Row], str]] = {
    "sweep": sweep_section,
    "run": run_section,
    "calibration": calibration_section,
}


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    text: Iterable[int] = (0,),
    wide: Iterable[int] = (),
    chosen: Iterable[int] = (),
) -> str:
    """Return an HTML table.

    Args:
        head: Names of the columns.
        rows: Cells.
        text: Columns that are read from the left.
        wide: Columns whose text is broken into lines.
        chosen: Rows that stand out.
    """
    classes = [
        " ".join(name for name, columns in (("text", set(text)), ("wide", set(wide))) if place in columns)
        for place in range(len(head))
    ]
    header = "".join(f"<th{_class(kind)}>{escape(cell)}</th>" for cell, kind in zip(head, classes, strict=True))
    stands_out = set(chosen)
    body = "".join(
        f"<tr{_class('chosen' if place in stands_out else '')}>"
        + "".join(f"<td{_class(kind)}>{_content(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        + "</tr>"
        for place, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _content(cell: Cell) -> str:
    if isinstance(cell, tuple):
        return f'<a href="{escape(cell[0], quote=True)}">{escape(cell[1])}</a>'
    return escape(cell)


def figure(drawn: Any, caption: str) -> str:
    """Return a picture with its caption."""
    return f"<figure>{plots.svg(drawn)}<figcaption>{escape(caption)}</figcaption></figure>"


def _pictures(pictures: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""
