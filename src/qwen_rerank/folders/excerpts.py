"""Answers with their place: where a passage stands, which words of the query are in it, what stands around it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.sync import HEADING_SEPARATOR
from qwen_rerank.folders.walk import matches_pattern
from qwen_rerank.store import FaissStore
from qwen_rerank.types import Document
from qwen_rerank.words import terms

_MOST_OVERLAP_CHARS = 4_000
Span = tuple[int, int]


def place_of(document: Document) -> str:
    """Return where a document stands, as `folder/file.md:12` or with a page; its id where it came from no file.

    >>> place_of(Document("a/b.pdf#2", "", {"source": "a/b.pdf", "page": 3}))
    'a/b.pdf, page 3'
    """
    data = document.metadata
    if "source" not in data:
        return document.id
    source = str(data["source"])
    if isinstance(data.get("line"), int):
        return f"{source}:{data['line']}"
    for name in ("page", "slide", "cell", "chapter"):
        if name in data:
            return f"{source}, {name} {data[name]}"
    return f"{source}, {data['sheet']} row {data['row']}" if "sheet" in data and "row" in data else source


def word_spans(text: str, query: str) -> list[Span]:
    """Return where words of the query stand in a text, in order; of Chinese, pairs of characters.

    >>> word_spans("The leases end", "when does the lease end")
    [(4, 9), (11, 14)]
    """
    wanted = {term for term in terms(query) if len(term) > 1 or not term.isascii()}
    pairs = {term for term in wanted if len(term) > 1 and not term.isascii()}
    single = {term for term in wanted if len(term) == 1}
    wanted -= single if pairs else set()
    if not wanted:
        return []
    parts = [
        rf"\b{re.escape(term)}" if term.isascii() else re.escape(term) for term in sorted(wanted, key=len, reverse=True)
    ]
    # A look-ahead, so that pairs of characters that overlap are all found.
    found = re.compile(f"(?=({'|'.join(parts)}))", re.IGNORECASE)
    merged: list[Span] = []
    for match in found.finditer(text):
        start, end = match.span(1)
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def file_filter(
    store: FaissStore,
    *,
    paths: Sequence[str] = (),
    suffixes: Sequence[str] = (),
    since: str | None = None,
    until: str | None = None,
) -> dict[str, Any] | None:
    """Return the filter that keeps passages of some files, None for all.

    Args:
        store: The store that is searched.
        paths: Patterns of `folder/path`, such as `notes/*` or `*.md`; one of them must fit.
        suffixes: Such as ".pdf"; one of them.
        since: First day that a file may have been written on, as YYYY-MM-DD or a time.
        until: Last one.

    Raises:
        InvalidInputError: If a date is none, or no file fits `paths`.
    """
    found: dict[str, Any] = {}
    if paths:
        sources = dict.fromkeys(one.rpartition("#")[0] for one in store.ids())
        wanted = [one for one in sources if any(matches_pattern(one, pattern) for pattern in paths)]
        if not wanted:
            raise InvalidInputError(
                f"no file of {store.path} fits {', '.join(map(repr, paths))}; see `qwen-rerank status`."
            )
        found["source"] = {"$in": wanted}
    if suffixes:
        found["suffix"] = {"$in": [f".{one.lower().removeprefix('.')}" for one in suffixes]}
    days = {"$gte": _day("since", since), "$lte": _day("until", until, last=True)}
    if given := {operator: day for operator, day in days.items() if day is not None}:
        found["modified"] = given
    return found or None


def _day(name: str, text: str | None, *, last: bool = False) -> date | None:
    if text is None:
        return None
    try:
        if len(text) <= 10:
            day = date.fromisoformat(text)
            return datetime(day.year, day.month, day.day, 23, 59, 59) if last else day
        return datetime.fromisoformat(text)
    except ValueError as exc:
        raise InvalidInputError(f"{name} must be a date such as 2026-05-01, not {text!r}.") from exc


def around(store: FaissStore, document: Document, n: int) -> tuple[list[Document], list[Document]]:
    """Return the `n` passages before a passage in its file, and those after it."""
    data = document.metadata
    source, part = data.get("source"), data.get("part")
    if not n or not isinstance(source, str) or not isinstance(part, int):
        return [], []
    before = store.get([f"{source}#{number}" for number in range(max(1, part - n), part)])
    return before, store.get([f"{source}#{number}" for number in range(part + 1, part + n + 1)])


def joined(passages: Sequence[Document]) -> str:
    """Return the text of passages that follow each other, without what they repeat of the one before."""
    text, last_line = "", None
    for passage in passages:
        own = without_heading(passage)
        line = passage.metadata.get("line")
        gap = "\n\n" if line is None or last_line is None else "\n" * min(2, max(0, line - last_line)) or " "
        last_line = passage.metadata.get("last_line")
        most = min(len(own), len(text), _MOST_OVERLAP_CHARS)
        shared = next((size for size in range(most, 15, -1) if text.endswith(own[:size])), 0)
        text += own if not text else own[shared:] if shared else gap + own
    return text


def without_heading(document: Document) -> str:
    """Return a passage's own text, without the headings that were put before it."""
    heading = str(document.metadata.get("heading") or "")
    return document.text.removeprefix(f"{heading}\n") if heading else document.text


def heading_of(metadata: Mapping[str, Any]) -> str:
    """Return the headings above a passage on one line, "" where there are none."""
    heading = metadata.get("heading")
    if isinstance(heading, list | tuple):
        return HEADING_SEPARATOR.join(map(str, heading))
    return "" if heading is None else str(heading)
