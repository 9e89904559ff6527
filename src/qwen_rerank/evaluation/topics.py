"""Queries out of files: JSONL, tab-separated lines, or TREC topics in both of their layouts."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from qwen_rerank.evaluation.files import EvalFileError, read_lines, read_objects, shown, text_of

log = logging.getLogger(__name__)

_TAG = re.compile(r"<\s*(/?)\s*([a-zA-Z-]{1,20})(?:\s+(?:number|id)\s*=\s*\"([^\"]{1,200})\")?\s*>")
_LABEL = re.compile(r"^\s*(?:Number|Topic|Query)\s*:", re.IGNORECASE)
_IDS, _TEXTS = ("num", "number"), ("title", "query", "topic")


def read_queries(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return query id to text.

    Three layouts are read: `{"_id", "text"}` lines (.jsonl, .jsonl.gz); TREC topics, where `<num>` or `<topic number="…">` gives
    the id and `<title>`, `<query>` or the topic itself the text, closed by tags or not; else `id<tab>text` lines.

    Raises:
        EvalFileError: If a line or topic lacks its id or text, an id occurs twice, or there is no query.
    """
    file = Path(path)
    queries: dict[str, str] = {}
    for number, query, text in _rows(file):
        if not query:
            raise EvalFileError(file, number, "a query has no id.")
        if query in queries:
            raise EvalFileError(file, number, f"the id {shown(query)} occurs twice.")
        if not text.strip():
            raise EvalFileError(file, number, f"the query {shown(query)} is empty.")
        queries[query] = text
    if not queries:
        raise EvalFileError(file, None, "holds no query.")
    log.info("%s: %d queries used, none ignored", file, len(queries))
    return queries


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    if ".jsonl" in path.suffixes:
        for number, row in read_objects(path):
            yield number, text_of(path, number, row, "_id"), text_of(path, number, row, "text")
        return
    lines = [(number, line) for number, line in read_lines(path) if line.strip()]
    yield from _topics(path, lines) if lines and lines[0][1].lstrip().startswith("<") else _tabbed(path, lines)


def _tabbed(path: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    for number, line in lines:
        query, tab, text = line.partition("\t")
        if not tab:
            raise EvalFileError(path, number, "no tab between the id and the text of the query.")
        yield number, query.strip(), text


def _topics(path: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """Yield (line, id, text) of every topic: a topic begins at `<top>` or `<topic>` and ends at the next or at its closing tag."""
    start: int | None = None
    fields: dict[str, str] = {}
    for number, closing, tag, attribute, text in _tagged(lines):
        if tag in ("top", "topic"):
            if start is not None:
                yield start, *_id_and_text(path, start, fields)
            start, fields = (None, {}) if closing else (number, {"num": attribute, "topic": text})
        elif start is not None and not closing:
            fields[tag] = text
    if start is not None:
        yield start, *_id_and_text(path, start, fields)


def _tagged(lines: list[tuple[int, str]]) -> Iterator[tuple[int, bool, str, str, str]]:
    """Yield (line, is it a closing tag, tag, number attribute, text up to the next tag)."""
    pending: tuple[int, bool, str, str] | None = None
    words: list[str] = []
    for number, line in lines:
        end = 0
        for match in _TAG.finditer(line):
            words.append(line[end : match.start()])
            end = match.end()
            if pending is not None:
                yield *pending, " ".join(" ".join(words).split())
            pending, words = (number, bool(match[1]), match[2].lower(), match[3] or ""), []
        words.append(line[end:])
    if pending is not None:
        yield *pending, " ".join(" ".join(words).split())


def _id_and_text(path: Path, number: int, fields: dict[str, str]) -> tuple[str, str]:
    query = next((fields[tag] for tag in _IDS if fields.get(tag)), "")
    text = next((fields[tag] for tag in _TEXTS if fields.get(tag)), "")
    if not query or not text:
        raise EvalFileError(path, number, "a topic has no <num> or no <title>.")
    return _LABEL.sub("", query).strip(), _LABEL.sub("", html.unescape(text)).strip()
