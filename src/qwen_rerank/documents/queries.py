"""Queries out of files: JSONL, tab-separated lines, or TREC topics in both of their layouts."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Iterable, Iterator
from operator import itemgetter

from qwen_rerank.documents.reader import Row, Skipped, Source, TextFile, shown, text_of
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
    queries = queries_of(file, _rows(file))
    log.info("%s: %d queries used", file.path, len(queries))
    return queries


def queries_of(source: Source, rows: Iterable[tuple[int, tuple[str, str]]]) -> dict[str, str]:
    """Return query id to text of rows of both, each id once.

    Raises:
        FileError: If an id or text is empty or an id occurs twice, where nothing may be skipped, or there is no query.
    """
    found = source.unique(source.each(rows, _query), itemgetter(slice(1)), "the id {0} occurs twice.")
    queries = dict(query for _, query in found)
    if not queries:
        raise FileError(source.place, None, "holds no query.")
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
        return file.each(file.objects(), id_and_text)
    lines = list(file.lines())
    if lines and lines[0][1].lstrip().startswith("<"):
        return file.each(_topics(lines), _topic_query)
    return file.each(lines, _tabbed)


def id_and_text(row: Row) -> tuple[str, str]:
    """Return the strings under `_id` and `text`."""
    return text_of(row, "_id"), text_of(row, "text")


def _tabbed(line: str) -> tuple[str, str]:
    query, tab, text = line.partition("\t")
    if not tab:
        raise InvalidInputError("no tab between the id and the text of the query.")
    return query.strip(), text


def _topics(lines: list[tuple[int, str]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, fields) of every topic: it begins at `<top>` or `<topic>` and ends at the next or at its closing tag."""
    text = "\n".join(line for _, line in lines)
    topic: tuple[int, dict[str, str]] | None = None
    tags = list(_TAG.finditer(text))
    for found, end in zip(tags, [*(tag.start() for tag in tags[1:]), None], strict=False):
        closing, tag, attribute = found.groups(default="")
        content = " ".join(text[found.end() : end].split())
        if tag.lower() in ("top", "topic"):
            if topic:
                yield topic
            number = lines[text.count("\n", 0, found.start())][0]
            topic = None if closing else (number, {"num": attribute, "topic": content})
        elif topic and not closing:
            topic[1][tag.lower()] = content
    if topic:
        yield topic


def _topic_query(fields: dict[str, str]) -> tuple[str, str]:
    query = next((fields[tag] for tag in _IDS if fields.get(tag)), "")
    text = next((fields[tag] for tag in _TEXTS if fields.get(tag)), "")
    if not query or not text:
        raise InvalidInputError("a topic has no <num> or no <title>.")
    return _LABEL.sub("", query).strip(), _LABEL.sub("", html.unescape(text)).strip()
