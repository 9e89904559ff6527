"""Queries out of files: JSONL, tab-separated lines, or TREC topics in both of their layouts."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Iterator

from qwen_rerank.documents.reader import Row, Skipped, TextFile, shown, text_of
from qwen_rerank.errors import FileError, InvalidInputError

log = logging.getLogger(__name__)

_TAG = re.compile(r"<\s*(/?)\s*([a-zA-Z-]{1,20})(?:\s+(?:number|id)\s*=\s*\"([^\"]{1,200})\")?\s*>")
_LABEL = re.compile(r"^\s*(?:Number|Topic|Query)\s*:", re.IGNORECASE)
_IDS, _TEXTS = ("num", "number"), ("title", "query", "topic")


def read_queries(path: str | os.PathLike[str], *, skipped: list[Skipped] | None = None) -> dict[str, str]:
    """Return query id to text.

    Three layouts are read: `{"_id", "text"}` lines (.jsonl, .jsonl.gz); TREC topics, where `<num>` or `<topic number="…">` gives
    the id and `<title>`, `<query>` or the topic itself the text, closed by tags or not; else `id<tab>text` lines.

    Args:
        path: The file, plain or gzip.
        skipped: Gets the lines and topics that cannot be used; None makes them errors.

    Raises:
        FileError: If a line or topic lacks its id or text, an id occurs twice, or there is no query.
    """
    file = TextFile(path, skipped=skipped)
    queries: dict[str, str] = {}
    for number, (query, text) in file.each(_rows(file), _query):
        if query in queries:
            file.refuse(number, f"the id {shown(query)} occurs twice.")
        else:
            queries[query] = text
    if not queries:
        raise FileError(file.path, None, "holds no query.")
    log.info("%s: %d queries used", file.path, len(queries))
    return queries


def _query(found: tuple[str, str]) -> tuple[str, str]:
    query, text = found
    if not query:
        raise InvalidInputError("a query has no id.")
    if not text.strip():
        raise InvalidInputError(f"the query {shown(query)} is empty.")
    return query, text


def _rows(file: TextFile) -> Iterator[tuple[int, tuple[str, str]]]:
    if ".jsonl" in file.path.suffixes:
        return file.each(file.objects(), _json_query)
    lines = list(file.lines())
    if lines and lines[0][1].lstrip().startswith("<"):
        return file.each(_topics(lines), _id_and_text)
    return file.each(lines, _tabbed)


def _json_query(row: Row) -> tuple[str, str]:
    return text_of(row, "_id"), text_of(row, "text")


def _tabbed(line: str) -> tuple[str, str]:
    query, tab, text = line.partition("\t")
    if not tab:
        raise InvalidInputError("no tab between the id and the text of the query.")
    return query.strip(), text


def _topics(lines: list[tuple[int, str]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, fields) of every topic: it begins at `<top>` or `<topic>` and ends at the next or at its closing tag."""
    start: int | None = None
    fields: dict[str, str] = {}
    for number, closing, tag, attribute, text in _tagged(lines):
        if tag in ("top", "topic"):
            if start is not None:
                yield start, fields
            start, fields = (None, {}) if closing else (number, {"num": attribute, "topic": text})
        elif start is not None and not closing:
            fields[tag] = text
    if start is not None:
        yield start, fields


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


def _id_and_text(fields: dict[str, str]) -> tuple[str, str]:
    query = next((fields[tag] for tag in _IDS if fields.get(tag)), "")
    text = next((fields[tag] for tag in _TEXTS if fields.get(tag)), "")
    if not query or not text:
        raise InvalidInputError("a topic has no <num> or no <title>.")
    return _LABEL.sub("", query).strip(), _LABEL.sub("", html.unescape(text)).strip()
