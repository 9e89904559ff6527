"""Strict readers of evaluation files: a bad line stops the reading with its place, and nothing is skipped in silence."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.types import Document

log = logging.getLogger(__name__)

Qrels = dict[str, dict[str, int]]
"""Query id to document id to grade; a grade above 0 is relevant."""

Run = dict[str, list[tuple[str, float]]]
"""Query id to (document id, score), best first."""

MAX_LINE_BYTES = 64 * 1024**2
MAX_FILE_BYTES = 16 * 1024**3  # after decompression
MAX_GZIP_RATIO = 200  # text shrinks to a tenth or so; what shrinks to less than a two-hundredth is a bomb
MAX_GRADE = 1000

_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # float() would take 1_0 and nan, too


class EvalFileError(InvalidInputError):
    """A file of an evaluation cannot be read as what it should be; the message begins with `file:line`."""

    def __init__(self, path: str | os.PathLike[str], line: int | None, reason: str) -> None:
        where = f"{os.fspath(path)}:{line}" if line is not None else os.fspath(path)
        super().__init__(f"{where}: {reason}")
        self.path = os.fspath(path)
        self.line = line
        self.reason = reason


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 file, gzip or plain; a byte-order mark is left out.

    Raises:
        EvalFileError: If the file is missing, not UTF-8, no sound gzip, has a line over `MAX_LINE_BYTES`, or is larger when
            decompressed than `MAX_FILE_BYTES` or than `MAX_GZIP_RATIO` allows.
    """
    number, total = 0, 0
    try:
        limit = _most_bytes(path)
        with _open(path) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                total += len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    raise EvalFileError(path, number, f"the line is longer than {MAX_LINE_BYTES} bytes.")
                if total > limit:
                    raise EvalFileError(path, number, f"the file holds more than {limit} bytes.")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as exc:
        raise EvalFileError(path, number, f"not UTF-8 ({exc.reason} at byte {exc.start}); convert the file.") from exc
    except (OSError, EOFError, zlib.error) as exc:
        raise EvalFileError(path, None, f"cannot be read ({exc}).") from exc


def _most_bytes(path: Path) -> int:
    if path.suffix != ".gz":
        return MAX_FILE_BYTES
    return min(MAX_FILE_BYTES, MAX_LINE_BYTES + path.stat().st_size * MAX_GZIP_RATIO)


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read relevance judgements: TREC (`query 0 document grade`) or BEIR (three tab-separated columns with a header).

    Raises:
        EvalFileError: On a wrong number of columns, a grade that is no integer of at least 0, or a pair judged twice.
    """
    file = Path(path)
    qrels: Qrels = {}
    beir, n_blank = False, 0
    for number, line in read_lines(file):
        if number == 1 and line.split("\t")[:1] == ["query-id"]:
            beir = True
            continue
        if not line.strip():
            n_blank += 1
            continue
        query, document, grade = _beir_columns(file, number, line) if beir else _trec_columns(file, number, line)
        judged = qrels.setdefault(query, {})
        if document in judged:
            raise EvalFileError(file, number, f"document {shown(document)} is judged twice for query {shown(query)}.")
        judged[document] = _grade(file, number, grade)
    if not qrels:
        raise EvalFileError(file, None, "holds no judgement.")
    n_judgements = sum(map(len, qrels.values()))
    log.info("%s: %d judgements of %d queries used, %d blank lines ignored", file, n_judgements, len(qrels), n_blank)
    return qrels


def shown(text: str) -> str:
    """Return the beginning of a word from a file, quoted, for an error message."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _beir_columns(path: Path, number: int, line: str) -> tuple[str, str, str]:
    columns = line.split("\t")
    if len(columns) != 3 or not all(column.strip() for column in columns):
        raise EvalFileError(path, number, f"{len(columns)} columns, not query-id, corpus-id and score divided by tabs.")
    return columns[0].strip(), columns[1].strip(), columns[2].strip()


def _trec_columns(path: Path, number: int, line: str) -> tuple[str, str, str]:
    columns = line.split()
    if len(columns) != 4:
        raise EvalFileError(path, number, f"{len(columns)} columns, not the 4 of TREC qrels: query 0 document grade.")
    return columns[0], columns[2], columns[3]


def _grade(path: Path, number: int, text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise EvalFileError(path, number, f"the grade {shown(text)} is no integer.")
    grade = int(text)
    if grade < 0:
        raise EvalFileError(path, number, f"the grade {grade} is negative; write 0 for what is not relevant.")
    if grade > MAX_GRADE:
        raise EvalFileError(path, number, f"the grade {grade} is above {MAX_GRADE}; are the columns in order?")
    return grade


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a TREC run (`query Q0 document rank score tag`); each query's documents come back best score first.

    Equal scores keep the order of the file, which is the order that the system returned.

    Raises:
        EvalFileError: On a wrong number of columns, a score that is no finite number, or a document twice in a query.
    """
    file = Path(path)
    run: Run = {}
    seen: set[tuple[str, str]] = set()
    n_blank = 0
    for number, line in read_lines(file):
        if not line.strip():
            n_blank += 1
            continue
        columns = line.split()
        if len(columns) != 6:
            raise EvalFileError(
                file, number, f"{len(columns)} columns, not the 6 of a TREC run: query Q0 document rank score tag."
            )
        query, document, score = columns[0], columns[2], _score(file, number, columns[4])
        if (query, document) in seen:
            raise EvalFileError(file, number, f"document {shown(document)} occurs twice for query {shown(query)}.")
        seen.add((query, document))
        run.setdefault(query, []).append((document, score))
    if not run:
        raise EvalFileError(file, None, "holds no line of a run.")
    for hits in run.values():
        hits.sort(key=lambda hit: -hit[1])
    log.info("%s: %d lines of %d queries used, %d blank lines ignored", file, len(seen), len(run), n_blank)
    return run


def _score(path: Path, number: int, text: str) -> float:
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise EvalFileError(path, number, f"the score {shown(text)} is not finite.")
    if not _NUMBER.fullmatch(text):
        raise EvalFileError(path, number, f"the score {shown(text)} is no number.")
    score = float(text)
    if not math.isfinite(score):
        raise EvalFileError(path, number, f"the score {shown(text)} is not finite.")
    return score


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


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file.

    Raises:
        EvalFileError: If a line is no JSON object.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise EvalFileError(path, number, f"no JSON ({exc}).") from exc
        if not isinstance(row, dict):
            raise EvalFileError(path, number, f"a JSON object is wanted, not {type(row).__name__}.")
        yield number, row


def text_of(path: Path, number: int, row: dict[str, Any], key: str) -> str:
    """Return the string under `key`.

    Raises:
        EvalFileError: If there is none, or it holds a lone surrogate.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise EvalFileError(path, number, f"{key!r} must be a string, not {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise EvalFileError(path, number, f"{key!r} holds a lone surrogate.") from None
    return value


def read_corpus(path: Path) -> list[Document]:
    """Read `{"_id", "title", "text", …}` lines; the text of a document is its title and text, other keys are metadata."""
    documents, seen = [], set()
    for number, row in read_objects(path):
        document_id, text = text_of(path, number, row, "_id"), text_of(path, number, row, "text")
        if document_id in seen:
            raise EvalFileError(path, number, f"the id {shown(document_id)} occurs twice.")
        seen.add(document_id)
        title = text_of(path, number, row, "title") if row.get("title") is not None else ""
        metadata = {key: value for key, value in row.items() if key not in ("_id", "text")}
        documents.append(Document(document_id, f"{title}\n{text}" if title else text, metadata))
    if not documents:
        raise EvalFileError(path, None, "holds no document.")
    log.info("%s: %d documents used, none ignored", path, len(documents))
    return documents
