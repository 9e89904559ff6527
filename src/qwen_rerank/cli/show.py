"""The commands' output: tables for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # doctor prints, too, and must run where numpy does not
    from qwen_rerank.documents import Skipped
    from qwen_rerank.evaluation.formats import FormatCost
    from qwen_rerank.pipeline import TwoRounds
    from qwen_rerank.types import RankedDocument

console = Console()
errors = Console(stderr=True, soft_wrap=True)

_SNIPPET_CHARS = 160  # more than a wide terminal shows; the table cuts it
_ID_CHARS = 20
_NAMES = 3  # of files that were left out for one reason
_FALLEN = 3  # rows for what the second round moved out of sight


def movement(before: int, after: int) -> str:
    """Return how far a document moved: green and up, red and down, or a dot."""
    if before == after:
        return "[dim]·[/]"
    return f"[green]▲ {before - after}[/]" if before > after else f"[red]▼ {after - before}[/]"


def snippet(text: str) -> str:
    """Return the beginning of `text` on one line, safe to print.

    A dot stands for the first line's end, which mostly is a title's, and a space for every other control character.
    """
    title, dot, rest = text[: 4 * _SNIPPET_CHARS].strip().partition("\n")
    line = f"{printable(title)} · {printable(rest)}" if dot else printable(title)
    return escape(line if len(line) <= _SNIPPET_CHARS else line[: _SNIPPET_CHARS - 1].rstrip() + "…")


def counted(number: int, thing: str) -> str:
    """Return a number and what it counts, as "1 file" and "2 files"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Return a text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def say(line: str) -> None:
    """Print a line on stderr, without control characters."""
    errors.print("".join(c if c.isprintable() else " " for c in line), highlight=False, markup=False)


def left_out(skipped: Sequence[Skipped], *, verbose: bool = False) -> None:
    """Print on stderr a line for each reason with the names of the files, and one for each file that lacks rows."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    by_file: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in skipped:
        name, _, row = one.where.rpartition(":")
        if name and row.isdecimal():
            by_file[name].append((row, one.reason))
        else:
            by_reason[one.reason].append(one.where)
    for reason, names in by_reason.items():
        more = f", … and {len(names) - _NAMES} more" if len(names) > _NAMES and not verbose else ""
        count = f"{len(names)} × " if len(names) > 1 else ""
        say(f"  skipped {count}{reason}: {', '.join(names if verbose else names[:_NAMES])}{more}")
    for name, rows in by_file.items():
        row, reason = rows[0]
        say(f"  skipped {counted(len(rows), 'row')} of {name}; the first is {row}: {reason}")
        for row, reason in rows[1:] if verbose else ():
            say(f"    {row}: {reason}")


def two_rounds(query: str, rounds: TwoRounds, *, n_rows: int, ids: bool = True, right: str | None = None) -> Table:
    """Return a table of both rounds: rank before and after, movement, score, text.

    The best `n_rows` results come in their order; below them, dimmed, stands what the second round moved out of them.

    Args:
        query: What was asked.
        rounds: What the first round found and the second made of it; that may be fewer.
        n_rows: Results to show.
        ids: Whether there is a column of ids with one line a document; without it texts take several.
        right: Id of the document that is known to answer the question; it carries a mark.
    """
    candidates, results = rounds.candidates, rounds.ranked
    table = _rounds_table(query, counted(len(candidates), "candidate"), ["round 1", "round 2"], ids=ids)
    shown, later = results[:n_rows], {hit.index: hit for hit in results[n_rows:]}
    for hit in shown:
        before = candidates[hit.index].rank
        ranks = f"[dim]{before}[/]", f"[bold]{hit.rank}[/]", movement(before, hit.rank)
        table.add_row(*ranks, *_verdict(hit, ids=ids), _text(hit, right))
    table.add_section()
    above = {hit.index for hit in shown}
    fallen = [index for index in range(min(n_rows, len(candidates))) if index not in above][:_FALLEN]
    fallen += [i for i, c in enumerate(candidates) if c.document.id == right and i not in above and i not in fallen]
    for index in fallen:
        before = candidates[index].rank
        if (after := later.get(index)) is not None:
            ranks = str(before), str(after.rank), movement(before, after.rank)
            table.add_row(*ranks, *_verdict(after, ids=ids), _text(after, right), style="dim")
    return table


def one_round(query: str, results: Sequence[RankedDocument], *, n_candidates: int) -> Table:
    """Return a table of reranked documents that no first stage had put in order."""
    table = _rounds_table(query, counted(n_candidates, "document"), ["rank"], ids=True)
    for hit in results:
        table.add_row(f"[bold]{hit.rank}[/]", *_verdict(hit, ids=True), _text(hit))
    return table


def _rounds_table(query: str, among: str, ranks: Sequence[str], *, ids: bool) -> Table:
    table = Table(
        title=f"[bold]{escape(query)}[/]  [dim]{among}[/]",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        expand=True,
    )
    for name in ranks:
        table.add_column(name, justify="right", no_wrap=True)
    if len(ranks) > 1:
        table.add_column("moved", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    if ids:
        table.add_column("id", max_width=_ID_CHARS, no_wrap=True, overflow="ellipsis")
    # Without ids somebody reads why a document is where it is: its text takes the lines that it needs.
    table.add_column("document", no_wrap=ids, overflow="ellipsis" if ids else "fold", ratio=1)
    return table


def _verdict(hit: RankedDocument, *, ids: bool) -> tuple[str, ...]:
    """Return the score, and the id where ids are shown."""
    score = f"{hit.score:.3f}" if hit.error is None else "[red]failed[/]"
    return (score, f"[cyan]{escape(_end_of(printable(hit.document.id)))}[/]") if ids else (score,)


def _end_of(id: str) -> str:
    """Return the end of an id, as much as its column holds: ids that are paths begin alike."""
    start = max(0, len(id) - _ID_CHARS)
    while cell_len(id[start:]) > _ID_CHARS - (start > 0):
        start += 1
    return f"…{id[start:]}" if start else id


def _text(hit: RankedDocument, right: str | None = None) -> str:
    """Return the beginning of the text with a mark where it is the right one, or why there is no score."""
    if hit.error is not None:
        return f"[red]{snippet(str(hit.error))}[/]"
    return ("[bold green]✓[/] " if hit.document.id == right else "") + snippet(hit.document.text)


def as_json(results: Sequence[RankedDocument]) -> None:
    """Print one JSON object a result on stdout."""
    for hit in results:
        json_line(json_row(hit))


def json_row(hit: RankedDocument) -> dict[str, Any]:
    """Return a result as JSON carries it."""
    return {
        "rank": hit.rank,
        "id": hit.document.id,
        "score": None if hit.error else hit.score,
        "log_odds": None if hit.error else hit.log_odds,
        "index": hit.index,
        "first_stage_score": hit.first_stage_score,
        "truncated": hit.truncated,
        "windows": hit.windows,
        "best_window": hit.best_window,
        "error": str(hit.error) if hit.error else None,
        "text": hit.document.text,
        "metadata": dict(hit.document.metadata),
    }


def json_line(row: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Print one JSON object on stdout, on one line unless it is indented."""
    text = json.dumps(row, ensure_ascii=False, default=str, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a console of another encoding: escaped, so that nothing is lost
        text = json.dumps(row, default=str, indent=indent)
    sys.stdout.write(text + "\n")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on a terminal what is being waited for, and for how long it has been."""
    if not errors.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        bar.add_task(escape(what), total=None)
        yield


def print_table(console: Console, made: Table) -> None:
    """Print a table whole, wider than the terminal where it must be: a number that lost its end would be another number."""
    least = console.measure(made, options=console.options.update(width=10_000)).minimum
    Console(file=console.file, width=max(console.width, least)).print(made)


def format_table(cost: FormatCost) -> Table:
    """Return what a number format costs beside the exact one."""
    change = cost.change

    def gib(n_bytes: int | None) -> str:
        return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"

    rows = [
        ["documents/s", *(f"{speed:.1f}" for speed in cost.documents_per_s)],
        ["most memory of the process", *map(gib, cost.peak_bytes)],
        ["nDCG@10", *(f"{value:.3f}" for value in cost.ndcg)],
        ["its change (95 %)", "", f"{change.difference:+.4f} ({change.low:+.4f} to {change.high:+.4f})"],
        ["log-odds: largest difference", "", f"{cost.largest:.3f}"],
        ["log-odds: typical (median)", "", f"{cost.typical:.4f}"],
        ["order kept (Kendall's tau)", "", "-" if cost.tau is None else f"{cost.tau:.4f}"],
        ["same among the first ten", "", f"{100 * cost.top_overlap:.1f} %"],
    ]
    made = number_table(["", *cost.names], rows)
    made.title = escape(f"{cost.model} on {cost.collection}: {cost.n_queries} queries, {cost.n_documents} documents")
    return made


def run_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the systems of a run with their measures, what changed against the first one, and what reranking changed."""
    names = list(result["measures"])
    means = [[row["label"], *(f"{row['means'][name]:.3f}" for name in names)] for row in result["systems"]]
    changes = [[row["label"], *_difference(row["comparison"])] for row in result["systems"] if row["comparison"]]
    head = _difference_head(result["primary"])
    tables = [number_table(["system", *names], means)]
    if changes:
        tables.append(number_table([f"against {result['systems'][0]['label']}", *head], changes))
    gains = [[row["label"], *_difference(row["gain"])] for row in result["systems"] if row["gain"]]
    if len({row["reranks"] for row in result["systems"]} - {None}) > 1:
        tables.append(number_table(["against the first stage that it reranks", *head], gains))
    return tables


def compare_table(result: Sequence[Mapping[str, Any]], primary: str) -> Table:
    """Return TREC runs with one measure, what changed against the first one, and the queries that do not count."""
    rows = [
        [
            row["label"],
            f"{row['mean']:.4f}",
            *_difference(row["comparison"]),
            str(row["n_missing"]),
            str(row["n_unjudged"]),
        ]
        for row in result
    ]
    return number_table(["run", primary, *_difference_head(primary), "unanswered", "unjudged"], rows)


def sweep_table(result: Mapping[str, Any]) -> Table:
    """Return all settings of a sweep; those that nothing beats at the same speed carry a star."""
    from qwen_rerank.evaluation.sweep import money

    primary = result["primary"]
    priced = result["outcomes"][0]["cost"] is not None
    rows = [
        [
            ("★ " if row["label"] in result["front"] else "  ") + row["label"],
            f"{row['means'][primary]:.4f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            str(row["n_timed"]),
            *([money(row["cost"])] if priced else []),
        ]
        for row in result["outcomes"]
    ]
    head = ["setting (★: nothing is better and as fast)", primary, "p50 ms", "p95 ms", "timed"]
    return number_table([*head, *(["cost of 1,000"] if priced else [])], rows)


def _difference(comparison: Mapping[str, Any] | None) -> list[str]:
    """Return the cells of one comparison; empty ones for the baseline."""
    if comparison is None:
        return ["", "", "", ""]
    c = comparison
    interval = f"{c['low']:+.4f} … {c['high']:+.4f}"
    counts = f"{c['wins']}/{c['losses']}/{c['ties']}"
    return [f"{c['difference']:+.4f}", interval, f"{c['p_corrected']:.4f}", counts]


def _difference_head(primary: str) -> list[str]:
    return [f"Δ {primary}", "95 % interval", "p (Holm)", "+/-/="]


def number_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column is text and whose others are numbers; nothing in it is markup."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(escape(head[0]), overflow="fold")
    for place, name in enumerate(head[1:], start=1):
        widest = max(len(cell) for cell in (name, *(row[place] for row in rows)))
        made.add_column(escape(name), justify="right", no_wrap=True, min_width=widest)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made
