"""Answers of a search on the screen: each passage with its place, its heading, both ranks, and the query's words marked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.padding import Padding
from rich.text import Text

from qwen_rerank.cli import show
from qwen_rerank.folders.excerpts import heading_of, place_of, without_heading, word_spans
from qwen_rerank.types import Document, RankedDocument

_MOST_CHARS = 600  # of a passage on the screen; --json and --md give all


@dataclass(frozen=True, slots=True)
class Answer:
    """A result with both its ranks and the passages around it.

    Attributes:
        hit: The result of the second round.
        before: Its rank in the first round.
        above: Passages that stand before it in its file.
        below: Passages that stand behind it.
    """

    hit: RankedDocument
    before: int
    above: list[Document] = field(default_factory=list)
    below: list[Document] = field(default_factory=list)


def as_json(answers: Sequence[Answer]) -> None:
    """Print one JSON object an answer on stdout."""
    for one in answers:
        around = {"above": [d.text for d in one.above], "below": [d.text for d in one.below]}
        shown = around if one.above or one.below else {}
        show.json_line(
            {**show.json_row(one.hit), "first_stage_rank": one.before, "place": place_of(one.hit.document), **shown}
        )


def as_files(answers: Sequence[Answer]) -> None:
    """Print the files of the answers, best first, each once."""
    for source in dict.fromkeys(str(one.hit.document.metadata.get("source", one.hit.document.id)) for one in answers):
        sys.stdout.write(show.printable(source) + "\n")


def as_markdown(query: str, answers: Sequence[Answer]) -> None:
    """Print the answers as Markdown: a heading with the place of each, and the passage as a quotation."""
    sys.stdout.write(f"# {show.printable(query)}\n")
    for one in answers:
        heading = heading_of(one.hit.document.metadata)
        title = f"{show.printable(place_of(one.hit.document))}" + (f" — {show.printable(heading)}" if heading else "")
        text = "\n\n".join(without_heading(d) for d in (*one.above, one.hit.document, *one.below))
        quoted = "\n".join(f"> {_clean(line)}".rstrip() for line in text.splitlines())
        score = "failed" if one.hit.error else f"{one.hit.score:.3f}"
        sys.stdout.write(f"\n## {one.hit.rank}. {title}\n\nscore {score}, round 1: {one.before}\n\n{quoted}\n")


def as_blocks(query: str, answers: Sequence[Answer], *, n_candidates: int) -> None:
    """Print the answers for people."""
    console = show.console
    title = Text.assemble((query, "bold"), (f"  {show.counted(n_candidates, 'candidate')}", "dim"))
    console.print(title)
    for one in answers:
        document, hit = one.hit.document, one.hit
        score = "failed" if hit.error else f"{hit.score:.3f}"
        line = Text.assemble(
            (f"{hit.rank:>2}  ", "bold"),
            Text.from_markup(f"score {score}  round 1: {one.before} {show.movement(one.before, hit.rank)}  "),
            (show.printable(place_of(document)), "cyan"),
        )
        console.print("", line, sep="\n", highlight=False)
        if heading := heading_of(document.metadata):
            console.print(Padding(Text(show.printable(heading), style="italic dim"), (0, 0, 0, 4)))
        for text in (
            *(_dimmed(d) for d in one.above),
            _passage(hit, query) if not hit.error else Text(show.printable(str(hit.error)), style="red"),
            *(_dimmed(d) for d in one.below),
        ):
            console.print(Padding(text, (0, 0, 0, 4)))


def _dimmed(document: Document) -> Text:
    return Text(_clean(without_heading(document)), style="dim")


def _passage(hit: RankedDocument, query: str) -> Text:
    """Return the passage's best window, with the words of the query marked; what is left out is an ellipsis."""
    text = without_heading(hit.document)
    offset = len(hit.document.text) - len(text)
    start, end = hit.best_window if hit.windows > 1 and hit.best_window else (0, len(hit.document.text))
    start, end = max(0, start - offset), max(0, end - offset)
    spans = [(a, b) for a, b in word_spans(text, query) if start <= a < end]
    if end - start > _MOST_CHARS:
        # Around the first words of the query, from a line's beginning where one is near.
        at = max(start, spans[0][0] - _MOST_CHARS // 4) if spans else start
        at = text.rfind("\n", start, at) + 1 or at if at > start else at
        start, end = max(start, at), min(end, at + _MOST_CHARS)
    shown = Text(("… " if start else "") + _clean(text[start:end]) + (" …" if end < len(text) else ""))
    shift = start - (2 if start else 0)
    for a, b in spans:
        if start <= a < end:
            shown.stylize("bold yellow", a - shift, min(b, end) - shift)
    return shown


def _clean(text: str) -> str:
    """Return a text of the same length without control characters, line ends kept."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
