"""Judgements and runs: TREC and BEIR files, read line by line and written whole."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

from qwen_rerank.documents.reader import Skipped, Source, TextFile, shown
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
    qrels = qrels_of(file, judgements(file))
    log.info("%s: %d judgements of %d queries used", file.path, sum(map(len, qrels.values())), len(qrels))
    return qrels


def qrels_of(source: Source, rows: Iterable[tuple[int, Judgement]]) -> Qrels:
    """Return the grades of rows of query id, document id and grade, each pair once.

    Raises:
        FileError: If a pair is judged twice, where nothing may be skipped, or there is no judgement.
    """
    qrels: Qrels = {}
    for _, (query, document, grade) in judged_once(source, rows):
        qrels.setdefault(query, {})[document] = grade
    if not qrels:
        raise FileError(source.place, None, "holds no judgement.")
    return qrels


def judged_once(source: Source, rows: Iterable[tuple[int, Judgement]]) -> Iterator[tuple[int, Judgement]]:
    """Yield the rows whose pair of query and document is new."""
    return source.unique(rows, itemgetter(0, 1), "document {1} is judged twice for query {0}.")


def split_file(folder: Path, split: str, *, skipped: list[Skipped] | None = None) -> TextFile:
    """Return the judgements of a folder in BEIR layout.

    Raises:
        FileError: If there is no such split; names those that exist.
    """
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        splits = sorted(other.stem for other in path.parent.glob("*.tsv"))
        raise FileError(path, None, f"no such split; there are: {', '.join(splits) or 'none'}.")
    return TextFile(path, skipped=skipped)


def judgements(file: TextFile) -> Iterator[tuple[int, Judgement]]:
    """Yield (line number, (query id, document id, grade)) of every judgement, as `read_qrels` reads them."""
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
    if not _INTEGER.fullmatch(text) or not 0 <= int(text) <= MAX_GRADE:
        raise InvalidInputError(f"the grade {shown(text)} is no integer from 0 to {MAX_GRADE}; 0 is not relevant.")
    return int(text)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a TREC run (`query Q0 document rank score tag`); each query's documents come back best score first.

    Equal scores keep the order of the file, which is the order that the system returned.

    Raises:
        FileError: On a wrong number of columns, a score that is no finite number, or a document twice in a query.
    """
    file = TextFile(path)
    run: Run = {}
    lines = file.unique(
        file.each(file.lines(), _run_line), itemgetter(0, 1), "document {1} occurs twice for query {0}."
    )
    for _, (query, document, score) in lines:
        run.setdefault(query, []).append((document, score))
    if not run:
        raise FileError(path, None, "holds no line of a run.")
    for hits in run.values():
        hits.sort(key=lambda hit: -hit[1])
    log.info("%s: %d lines of %d queries used", file.path, sum(map(len, run.values())), len(run))
    return run


def _run_line(line: str) -> tuple[str, str, float]:
    columns = line.split()
    if len(columns) != 6:
        raise InvalidInputError(f"{len(columns)} columns, not the 6 of a TREC run: query Q0 document rank score tag.")
    if not _NUMBER.fullmatch(columns[4]) or not math.isfinite(float(columns[4])):
        raise InvalidInputError(f"the score {shown(columns[4])} is no finite number.")
    return columns[0], columns[2], float(columns[4])


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
            check_run_names((query, document, tag))
            lines.append(f"{query} Q0 {document} {rank} {len(hits) - rank + 1} {tag}\n")
    write_whole("".join(lines), file)


def check_run_names(names: Iterable[str]) -> None:
    """Refuse ids and tags that a TREC run cannot carry.

    Raises:
        InvalidInputError: If one holds white space or is empty.
    """
    for name in names:
        if name.split() != [name]:
            raise InvalidInputError(
                f"{name!r} holds white space or is empty, which a TREC run cannot carry; rename it."
            )


def write_whole(text: str, path: str | os.PathLike[str]) -> None:
    """Write a file as a whole or not at all, its folder made where there is none.

    Raises:
        FileError: If it cannot be written.
    """
    file = Path(path)
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(file)
    except OSError as exc:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise FileError(path, None, f"cannot be written ({exc.strerror}).") from exc
