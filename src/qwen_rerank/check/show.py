"""A report as a table that a person understands."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_rerank.check.findings import Report

_MARKS = {
    "ok": "[green]ok[/]",
    "wrong": "[bold red]wrong[/]",
    "warning": "[yellow]mind[/]",
    "unknown": "[blue]cannot tell[/]",
    "skipped": "[dim]not tried[/]",
}
_VERDICTS = {
    "right": "[bold green]The scores are right.[/]",
    "wrong": "[bold red]The scores cannot be trusted[/]: see {rows}.",
    "cannot tell": "[bold yellow]Cannot tell whether the scores are right:[/] nothing odd was seen, and nothing proves them.",
}


def show(report: Report, console: Console) -> None:
    """Print the findings and what they add up to."""
    table = Table(title=escape(report.target), title_justify="left", show_lines=True, expand=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was seen, what it means, what helps", overflow="fold")
    for finding in report.findings:
        parts = [escape(finding.saw)]
        if finding.why:
            parts.append(f"[italic]{escape(finding.why)}[/]")
        if finding.cure:
            parts.append(f"[bold]→ {escape(finding.cure)}[/]")
        table.add_row(finding.check, _MARKS[finding.status], "\n".join(parts))
    console.print(table)
    rows = ", ".join(finding.check for finding in report.findings if finding.status == "wrong")
    console.print(_VERDICTS[report.verdict].format(rows=rows))
