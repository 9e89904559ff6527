"""What the commands print: tables for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_rerank.types import Candidate, RankedDocument

console = Console()
errors = Console(stderr=True)

_BAR_CHARS = 10
_SNIPPET_CHARS = 160  # more than a wide terminal shows; the table cuts it


def movement(before: int, after: int) -> str:
    """Return how far a document moved: green and up, red and down, or a dot."""
    if before == after:
        return "[dim]·[/]"
    return f"[green]▲ {before - after}[/]" if before > after else f"[red]▼ {after - before}[/]"


def bar(score: float) -> str:
    """Return a bar of ten characters for a score in [0, 1]."""
    filled = round(score * _BAR_CHARS)
    return f"[cyan]{'█' * filled}[/][dim]{'░' * (_BAR_CHARS - filled)}[/]"


def snippet(text: str, *, chars: int = 60) -> str:
    """Return the beginning of `text` on one line, safe to print: control characters become spaces."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * chars]).split())
    return escape(line if len(line) <= chars else line[: chars - 1] + "…")


def two_rounds(
    title: str, candidates: Sequence[Candidate], results: Sequence[RankedDocument], *, n_rows: int = 10
) -> Table:
    """Return a table of the final order beside the first stage's: new rank, old rank, movement, score, text.

    The candidates tell how many there were; the results come in their new order.
    """
    table = Table(title=f"[bold]{escape(title)}[/]", title_justify="left", expand=True, pad_edge=False)
    table.add_column("rank", justify="right", style="bold", min_width=4)
    table.add_column("was", justify="right", style="dim", min_width=3)
    table.add_column("moved", min_width=5)
    table.add_column("P(yes)", justify="right", min_width=6)
    table.add_column("", min_width=_BAR_CHARS)
    table.add_column(f"document (of {len(candidates)} candidates)", no_wrap=True, overflow="ellipsis", ratio=1)
    for hit in results[:n_rows]:
        was = candidates[hit.index].rank
        if hit.error is not None:
            table.add_row(str(hit.rank), str(was), "", "failed", "", f"{escape(str(hit.error))}")
            continue
        text = snippet(hit.document.text, chars=_SNIPPET_CHARS)
        table.add_row(str(hit.rank), str(was), movement(was, hit.rank), f"{hit.score:.3f}", bar(hit.score), text)
    return table


def as_json(results: Sequence[RankedDocument]) -> None:
    """Print one JSON object a result on stdout."""
    for hit in results:
        row = {
            "rank": hit.rank,
            "id": hit.document.id,
            "score": None if hit.error else hit.score,
            "log_odds": None if hit.error else hit.log_odds,
            "index": hit.index,
            "first_stage_score": hit.first_stage_score,
            "truncated": hit.truncated,
            "windows": hit.windows,
            "error": str(hit.error) if hit.error else None,
            "text": hit.document.text,
            "metadata": dict(hit.document.metadata),
        }
        sys.stdout.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
