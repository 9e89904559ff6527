"""Sections of a text: the parts that stand under one heading, with the place that each came from."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_MARKDOWN_HEADING = re.compile(r"(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*")
_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})")
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}[ \t]*")
# A definition that begins in the first column: the languages that people keep in folders, none of them parsed.
_DEFINITION = re.compile(
    r"(?:export |default |public |private |protected |static |pub(?:\(\w+\))? |async |abstract |final |unsafe )*"
    r"(?:def|class|function|func|fn|impl|struct|enum|trait|interface|type|module|namespace|CREATE TABLE)\s+([\w.:<>$]+)"
)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a file.

    Attributes:
        text: Its text, as it is read by embedder and reranker.
        heading: The headings above it, outermost first.
        line: Line of the file where the text begins, from 1; None where the file has no lines.
        place: What else tells where it is, such as `{"page": 3}`; goes into the metadata.
        alone: Whether it is a record of its own, never joined with its neighbours.
    """

    text: str
    heading: tuple[str, ...] = ()
    line: int | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False


class Headings:
    """The headings above the place that is being read."""

    def __init__(self) -> None:
        self._levels: dict[int, str] = {}

    def enter(self, level: int, title: str) -> None:
        """Take a heading; what stood at its level or below is left."""
        self._levels = {above: name for above, name in self._levels.items() if above < level}
        if title := " ".join(title.split()):
            self._levels[level] = title

    @property
    def path(self) -> tuple[str, ...]:
        """The headings, outermost first."""
        return tuple(self._levels[level] for level in sorted(self._levels))


def _cut(lines: list[str], marks: Iterator[tuple[int, int, str]]) -> list[Section]:
    """Return the sections that begin at marks of (line from 0, level, title); a heading is part of its section."""
    headings, sections, start = Headings(), [], 0
    path: tuple[str, ...] = ()
    for number, level, title in [*marks, (len(lines), 0, "")]:
        text = "".join(lines[start:number])
        if text.strip():
            sections.append(Section(text, path, start + 1))
        headings.enter(level, title)
        start, path = number, headings.path
    return sections


def _lines(text: str) -> list[str]:
    """Return the lines as editors count them, with their ends; `splitlines` also breaks at form feeds and U+2028."""
    return list(io.StringIO(text, newline="\n"))


def markdown(text: str) -> list[Section]:
    """Return the sections of a Markdown text; a `#` inside a fence is no heading."""
    return _cut(lines := _lines(text), _markdown_marks(lines))


def _markdown_marks(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    fence = ""
    for number, line in enumerate(lines):
        if found := _FENCE.match(line):
            if not fence:
                fence = found[1]
            elif found[1].startswith(fence) and not line[found.end() :].strip():
                fence = ""
        elif fence:
            continue
        elif heading := _MARKDOWN_HEADING.fullmatch(line.rstrip("\r\n")):
            yield number, len(heading[1]), heading[2]
        elif number and re.fullmatch(r"(=+|-{3,})\s*", line) and _is_title(lines, number - 1):
            yield number - 1, 1 if line[0] == "=" else 2, lines[number - 1]


def _is_title(lines: list[str], number: int) -> bool:
    """Return whether a line stands alone under a blank one, as the title over an underline does."""
    line = lines[number].strip()
    return bool(line) and line[0] not in "#>|-*" and (number == 0 or not lines[number - 1].strip())


def restructured(text: str) -> list[Section]:
    """Return the sections of a reStructuredText; levels are in the order in which the underlines first come."""
    return _cut(lines := _lines(text), _underlined(lines))


def _underlined(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    kinds: list[tuple[str, bool]] = []
    for number in range(1, len(lines)):
        under, title = _UNDERLINE.fullmatch(lines[number].rstrip("\r\n")), lines[number - 1].strip()
        if not under or not title or _UNDERLINE.fullmatch(title) or len(lines[number].rstrip()) < len(title):
            continue
        over = number > 1 and lines[number - 2].rstrip() == lines[number].rstrip()
        if not over and number > 1 and lines[number - 2].strip():
            continue  # the foot of a table
        kind = (under[1], over)
        if kind not in kinds:
            kinds.append(kind)
        yield number - (2 if over else 1), kinds.index(kind) + 1, title


def code(text: str) -> list[Section]:
    """Return the sections of source code, one for each definition that begins in the first column."""
    return _cut(lines := _lines(text), _definitions(lines))


def _definitions(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    for number, line in enumerate(lines):
        if line[:1].isalpha() and (found := _DEFINITION.match(line)):
            start = number
            while start and lines[start - 1][:1] in ("@", "#", "/") and lines[start - 1].strip():
                start -= 1  # decorators and the comment above belong to it
            yield start, 1, found[1].rstrip(":")


def plain(text: str) -> list[Section]:
    """Return a text as one section."""
    return [Section(text, (), 1)] if text.strip() else []
