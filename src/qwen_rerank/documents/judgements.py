"""Judgements and runs: TREC and BEIR files, read line by line and written whole."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from qwen_rerank.documents.reader import TextFile, shown
from qwen_rerank.errors import FileError, InvalidInputError

log = logging.getLogger(__name__)

Qrels = dict[str, dict[str, int]]
"""Query id to document id to grade; a grade above 0 is relevant."""

Run = dict[str, list[tuple[str, float]]]
"""Query id to (document id, score), best first."""

MAX_GRADE = 1000

_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # float() would take 1_0 and nan, too

Judgement = tuple[str, str, int]


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read relevance judgements: TREC (`query 0 document grade`) or BEIR (three tab-separated columns with a header).

    Raises:
        FileError: On a wrong number of columns, a grade that is no integer of at least 0, or a pair judged twice.
    """
    file = TextFile(path)
    qrels: Qrels = {}
    for _, (query, document, grade) in judgements(file):
        qrels.setdefault(query, {})[document] = grade
    if not qrels:
        raise FileError(path, None, "holds no judgement.")
    log.info("%s: %d judgements of %d queries used", file.path, sum(map(len, qrels.values())), len(qrels))
    return qrels


def judgements(file: TextFile) -> Iterator[tuple[int, Judgement]]:
    """Yield (line number, (query id, document id, grade)) of every judgement, as `read_qrels` reads them."""
    seen: set[tuple[str, str]] = set()
    for number, judgement in _judgements(file):
        if judgement[:2] in seen:
            query, document = map(shown, judgement[:2])
            file.refuse(number, f"document {document} is judged twice for query {query}.")
        else:
            seen.add(judgement[:2])
            yield number, judgement


def _judgements(file: TextFile) -> Iterator[tuple[int, Judgement]]:
    lines = file.lines()
    first = next(lines, None)
    if first is None:
        return
    if first[1].split("\t")[:1] == ["query-id"]:
        yield from file.each(lines, _beir_judgement)
    else:
        yield from file.each([first], _trec_judgement)
        yield from file.each(lines, _trec_judgement)


def _beir_judgement(line: str) -> Judgement:
    columns = [column.strip() for column in line.split("\t")]
    if len(columns) != 3 or not all(columns):
        raise InvalidInputError(f"{len(columns)} columns, not query-id, corpus-id and score divided by tabs.")
    return columns[0], columns[1], _grade(columns[2])


def _trec_judgement(line: str) -> Judgement:
    columns = line.split()
    if len(columns) != 4:
        raise InvalidInputError(f"{len(columns)} columns, not the 4 of TREC qrels: query 0 document grade.")
    return columns[0], columns[2], _grade(columns[3])


def _grade(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise InvalidInputError(f"the grade {shown(text)} is no integer.")
    grade = int(text)
    if grade < 0:
        raise InvalidInputError(f"the grade {grade} is negative; write 0 for what is not relevant.")
    if grade > MAX_GRADE:
        raise InvalidInputError(f"the grade {grade} is above {MAX_GRADE}; are the columns in order?")
    return grade


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a TREC run (`query Q0 document rank score tag`); each query's documents come back best score first.

    Equal scores keep the order of the file, which is the order that the system returned.

    Raises:
        FileError: On a wrong number of columns, a score that is no finite number, or a document twice in a query.
    """
    file = TextFile(path)
    run: Run = {}
    seen: set[tuple[str, str]] = set()
    for number, (query, document, score) in file.each(file.lines(), _run_line):
        if (query, document) in seen:
            file.refuse(number, f"document {shown(document)} occurs twice for query {shown(query)}.")
        seen.add((query, document))
        run.setdefault(query, []).append((document, score))
    if not run:
        raise FileError(path, None, "holds no line of a run.")
    for hits in run.values():
        hits.sort(key=lambda hit: -hit[1])
    log.info("%s: %d lines of %d queries used", file.path, len(seen), len(run))
    return run


def _run_line(line: str) -> tuple[str, str, float]:
    columns = line.split()
    if len(columns) != 6:
        raise InvalidInputError(f"{len(columns)} columns, not the 6 of a TREC run: query Q0 document rank score tag.")
    text = columns[4]
    finite = text.lower().lstrip("+-") not in ("nan", "inf", "infinity")
    if finite and not _NUMBER.fullmatch(text):
        raise InvalidInputError(f"the score {shown(text)} is no number.")
    if not finite or not math.isfinite(float(text)):
        raise InvalidInputError(f"the score {shown(text)} is not finite.")
    return columns[0], columns[2], float(text)


def write_run(run: Run, path: str | os.PathLike[str], *, tag: str) -> None:
    """Write a TREC run whose scores fall strictly, so that every tool reads the order that was returned.

    Measures break ties in ways of their own; `n - rank` leaves nothing to break. Written whole or not at all.

    Raises:
        InvalidInputError: If an id or the tag holds white space, which the format cannot carry.
    """
    file = Path(path)
    lines = []
    for query, hits in run.items():
        for rank, (document, _) in enumerate(hits, start=1):
            for word in (query, document, tag):
                if not word or word.split() != [word]:
                    raise InvalidInputError(
                        f"{word!r} holds white space or is empty, which a TREC run cannot carry; rename it."
                    )
            lines.append(f"{query} Q0 {document} {rank} {len(hits) - rank + 1} {tag}\n")
    write_whole("".join(lines), file)


def write_whole(text: str, path: str | os.PathLike[str]) -> None:
    """Write a file as a whole or not at all, its folder made where there is none."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(file)
