"""Tables that the commands of `qwen-rerank eval` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_rerank.evaluation.sweep import money


def print_table(console: Console, made: Table) -> None:
    """Print a table whole, wider than the terminal where it must be: a number that lost its end would be another number."""
    least = console.measure(made, options=console.options.update(width=10_000)).minimum
    Console(file=console.file, width=max(console.width, least)).print(made)


def run_tables(result: Mapping[str, Any]) -> tuple[Table, Table]:
    """Return the systems of a run with their measures, and what changed against the first one."""
    names = list(result["measures"])
    means = [[row["label"], *(f"{row['means'][name]:.3f}" for name in names)] for row in result["systems"]]
    changes = [[row["label"], *difference(row["comparison"])] for row in result["systems"] if row["comparison"]]
    return table(["system", *names], means), table(
        [f"against {result['systems'][0]['label']}", *_difference_head(result["primary"])], changes
    )


def compare_table(result: Sequence[Mapping[str, Any]], primary: str) -> Table:
    """Return TREC runs with one measure, what changed against the first one, and the queries that do not count."""
    rows = [
        [
            row["label"],
            f"{row['mean']:.4f}",
            *difference(row["comparison"]),
            str(row["n_missing"]),
            str(row["n_unjudged"]),
        ]
        for row in result
    ]
    return table(["run", primary, *_difference_head(primary), "unanswered", "unjudged"], rows)


def sweep_table(result: Mapping[str, Any]) -> Table:
    """Return all settings of a sweep; those that nothing beats at the same speed carry a star."""
    primary = result["primary"]
    priced = result["outcomes"][0]["cost"] is not None
    rows = [
        [
            ("★ " if row["label"] in result["front"] else "  ") + row["label"],
            f"{row['means'][primary]:.4f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            *([money(row["cost"])] if priced else []),
        ]
        for row in result["outcomes"]
    ]
    head = ["setting (★: nothing is better and as fast)", primary, "p50 ms", "p95 ms"]
    return table([*head, *(["cost of 1,000"] if priced else [])], rows)


def difference(comparison: Mapping[str, Any] | None) -> list[str]:
    """Return the cells of one comparison; empty ones for the baseline."""
    if comparison is None:
        return ["", "", "", ""]
    c = comparison
    interval = f"{c['low']:+.4f} … {c['high']:+.4f}"
    counts = f"{c['wins']}/{c['losses']}/{c['ties']}"
    return [f"{c['difference']:+.4f}", interval, f"{c['p_corrected']:.4f}", counts]


def _difference_head(primary: str) -> list[str]:
    return [f"Δ {primary}", "95 % interval", "p (Holm)", "+/-/="]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column is text and whose others are numbers; nothing in it is markup."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column(escape(head[0]), overflow="fold")
    for place, name in enumerate(head[1:], start=1):
        widest = max(len(cell) for cell in (name, *(row[place] for row in rows)))
        made.add_column(escape(name), justify="right", no_wrap=True, min_width=widest)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made
