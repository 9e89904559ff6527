"""Rows of CSV, JSON lines and spreadsheets: each is a text of its own, its other columns metadata."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from qwen_rerank.bounded_json import MAX_VALUES, JsonLimitError, check_json
from qwen_rerank.checks import check_text
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.sections import Section

TEXT_COLUMNS = ("text", "content", "contents")
_RECORD_LINES = 10_000  # a quoted field that runs on for longer is a stray quote
_MOST_CELL_CHARS = 1 << 24
_DELIMITER_LINE = re.compile(r"sep=(.)")  # Excel's, above the header
_SMALL_ROW_BYTES = 1 << 15  # a store takes as little, whatever is in it
_MOST_BAD = 1_000  # rows that are named one by one

Refuse = Callable[[int, str], None]


def csv_rows(text: str, refuse: Refuse) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, column to value) of each record; what is no record is refused and reading goes on in the next line."""
    # Of the whole process, and only ever raised: the module's own limit cuts long documents to pieces.
    csv.field_size_limit(max(csv.field_size_limit(), _MOST_CELL_CHARS))
    lines = list(io.StringIO(text, newline=""))  # `splitlines` would also break a cell at U+2028 or a form feed
    start = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    delimiter = _delimiter(lines[start]) if start < len(lines) else ","
    if start < len(lines) and (named := _DELIMITER_LINE.fullmatch(lines[start].strip("\r\n"))):
        delimiter, start = named[1], start + 1
    header: list[str] | None = None
    while start < len(lines):
        # A reader of its own for each record: a quote that is never closed costs its own line, not all that follow.
        part = (lines[number] for number in range(start, min(start + _RECORD_LINES, len(lines))))
        reader = csv.reader(part, delimiter=delimiter, strict=True)
        try:
            row = next(reader)
        except (csv.Error, StopIteration) as exc:
            refuse(start + 1, f"no CSV record ({exc}).")
            start += 1
            continue
        line, used = start + 1, reader.line_num
        if header is None:
            header = _names([name.strip() for name in row])
        elif used > 1 and len(row) != len(header):
            refuse(line, f"no CSV record (a quote that closes {used - 1} lines further on).")
            used = 1
        elif any(cell.strip() for cell in row):
            names = [*header, *(f"column {n}" for n in range(len(header) + 1, len(row) + 1))]
            yield line, dict(zip(names, row))
        start += used


def _names(header: Iterable[str]) -> list[str]:
    """Return a name of its own for each column: "price" and "price 2" where there are two of one name."""
    found: dict[str, None] = {}
    used: Counter[str] = Counter()  # so that a header of one name a million times takes no million steps each
    for place, name in enumerate(header, start=1):
        own = name = name or f"column {place}"
        while own in found:
            used[name] += 1
            own = f"{name} {used[name] + 1}"
        found[own] = None
    return list(found)


def _delimiter(head: str) -> str:
    return max(",\t;", key=head.count)


def json_rows(text: str, refuse: Refuse) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of JSON lines."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            refuse(number, f"no JSON ({exc}).")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            refuse(number, f"a JSON object is wanted, not {type(row).__name__}.")


def sheet_rows(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, column to value) of a sheet whose first row that is not empty names the columns."""
    header: list[str] | None = None
    for number, row in enumerate(rows, start=1):
        cells = [None if cell is None or cell == "" else cell for cell in row]
        if all(cell is None for cell in cells):
            continue
        if header is None:
            header = _names("" if cell is None else str(cell) for cell in cells)
        else:
            named = zip(header, cells)
            yield number, {name: _plain(cell) for name, cell in named if cell is not None}


def _plain(cell: Any) -> Any:
    return cell if isinstance(cell, str | int | float | bool) else str(cell)


def row_sections(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    refuse: Refuse,
    *,
    text_column: str | None,
    heading: tuple[str, ...] = (),
    place: Callable[[int], dict[str, Any]] | None = None,
) -> Iterator[Section]:
    """Yield a section for each row.

    Args:
        rows: (number, column to value).
        refuse: Takes the rows that cannot be used, with the reason.
        text_column: The column that is read; None reads `text`, `content` or `contents`, else all columns.
        heading: What stands above the table.
        place: What tells where a row is, beside its line; None where the number is a line.
    """
    for number, row in rows:
        try:
            text = _text(row, text_column)
            fields = {key: value for key, value in row.items() if _keeps(key, value)}
            used = text_column or next((key for key in TEXT_COLUMNS if isinstance(row.get(key), str)), None)
            fields.pop(used or "", None)
            _check_size(fields)
        except InvalidInputError as exc:
            refuse(number, str(exc))
            continue
        line = number if place is None else None
        yield Section(text, heading, line, {"fields": fields, **(place(number) if place else {})}, alone=True)


def _text(row: Mapping[str, Any], text_column: str | None) -> str:
    if text_column is not None:
        if text_column not in row:
            raise InvalidInputError(
                f"no column {text_column!r}; the columns are {', '.join(map(repr, row))}: name one with --text-column."
            )
        text = _shown(row[text_column])
    elif known := next((key for key in TEXT_COLUMNS if isinstance(row.get(key), str)), None):
        title = row.get("title")
        text = f"{title}\n{row[known]}" if isinstance(title, str) and title.strip() else row[known]
    else:
        text = "\n".join(f"{key}: {_shown(value)}" for key, value in row.items() if value not in (None, "", [], {}))
    if not check_text("the text", text).strip():
        raise InvalidInputError("the row has no text.")
    return text


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _keeps(key: str, value: Any) -> bool:
    """Return True for a value that JSON can carry.

    Raises:
        InvalidInputError: If it cannot; names the key.
    """
    check_text("the name of a column", key)
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, UnicodeEncodeError, RecursionError) as exc:
        raise InvalidInputError(f"{key!r} is nothing that JSON can carry ({exc}).") from exc
    return True


def _check_size(fields: Mapping[str, Any]) -> None:
    """Raise InvalidInputError unless a store would take a row's other columns beside its place."""
    data = json.dumps(fields, ensure_ascii=False).encode()
    if len(data) < _SMALL_ROW_BYTES:
        return
    try:
        check_json(data, max_values=MAX_VALUES - 1_000)
    except JsonLimitError as exc:
        raise InvalidInputError(f"the row {exc}.") from exc


class Refusals:
    """The rows of one file that cannot be used, each named up to a thousand."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []
        self.count = 0

    def __call__(self, number: int, reason: str) -> None:
        """Note a row."""
        self.count += 1
        if self.count <= _MOST_BAD:
            self.rows.append((number, reason))
