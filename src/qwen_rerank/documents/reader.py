"""A file of text, gzip or plain, read within bounds; what is wrong stops the reading or is noted, as the caller wants."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from qwen_rerank.checks import check_text
from qwen_rerank.errors import FileError, InvalidInputError
from qwen_rerank.regular_files import open_regular

MAX_LINE_BYTES = 64 * 1024**2  # also of a file that is one document
MAX_FILE_BYTES = 16 * 1024**3  # after decompression
MAX_GZIP_RATIO = 200  # text shrinks to a tenth or so; what shrinks to less than a two-hundredth is a bomb

T = TypeVar("T")
U = TypeVar("U")
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in a file that could not be used: where, as `file` or `file:line`, and why."""

    where: str
    reason: str


class Source:
    """Rows out of a file or a table, each with its number.

    Args:
        place: As errors call it.
        skipped: Gets what cannot be used, and the reading goes on behind it; None makes it a `FileError`.
        name: As `skipped` calls it.
    """

    def __init__(self, place: str | os.PathLike[str], skipped: list[Skipped] | None, name: str) -> None:
        self.place = place
        self.skipped = skipped
        self.name = name

    def refuse(self, number: int | None, reason: str) -> None:
        """Say that a row, or with None the whole, cannot be used.

        Raises:
            FileError: Where nothing may be skipped.
        """
        if self.skipped is None:
            raise FileError(self.place, number, reason)
        self.skipped.append(Skipped(self.name if number is None else f"{self.name}:{number}", reason))

    def each(self, rows: Iterable[tuple[int, T]], parse: Callable[[T], U]) -> Iterator[tuple[int, U]]:
        """Yield (number, what `parse` makes of a row); its `InvalidInputError` refuses the row."""
        for number, row in rows:
            try:
                parsed = parse(row)
            except InvalidInputError as exc:
                self.refuse(number, str(exc))
            else:
                yield number, parsed

    def unique(
        self, rows: Iterable[tuple[int, T]], key: Callable[[T], tuple[str, ...]], reason: str
    ) -> Iterator[tuple[int, T]]:
        """Yield the rows whose key is new; `reason`, with `{0}` for the key's first part, refuses the others."""
        seen: set[tuple[str, ...]] = set()
        for number, row in rows:
            if key(row) in seen:
                self.refuse(number, reason.format(*map(shown, key(row))))
            else:
                seen.add(key(row))
                yield number, row


class TextFile(Source):
    """A UTF-8 file, plain or gzip; a byte-order mark is left out.

    Args:
        path: The file.
        skipped: As in `Source`.
        name: As `skipped` calls the file; its own name where it is None.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, skipped: list[Skipped] | None = None, name: str | None = None
    ) -> None:
        self.path = Path(path)
        super().__init__(self.path, skipped, self.path.name if name is None else name)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield (line number from 1, line without its end) of every line that is not blank."""
        for number, line in self._lines():
            if line.strip():
                yield number, line.rstrip("\r\n")

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line number, object) of a JSONL file."""
        return self.each(self.lines(), _object)

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yield every line with its end, decoded."""
        return self.each(self._raw_lines(), _decoded)

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        number, total = 0, 0
        try:
            limit = self._most_bytes()
            with open_regular(self.path) as opened:
                file = cast("BinaryIO", gzip.GzipFile(fileobj=opened)) if self.path.suffix == ".gz" else opened
                while raw := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    total += len(raw)
                    if len(raw) > MAX_LINE_BYTES:
                        return self.refuse(number, f"the line is longer than {MAX_LINE_BYTES} bytes.")
                    if total > limit:
                        return self.refuse(number, f"the file holds more than {limit} bytes.")
                    yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        except (OSError, EOFError, zlib.error) as exc:
            self.refuse(None, f"cannot be read ({exc}).")

    def _most_bytes(self) -> int:
        if self.path.suffix != ".gz":
            return MAX_FILE_BYTES
        return min(MAX_FILE_BYTES, MAX_LINE_BYTES + self.path.stat().st_size * MAX_GZIP_RATIO)


def text_of(row: Row, key: str) -> str:
    """Return the string under `key`.

    Raises:
        InvalidInputError: If there is none, or it holds a lone surrogate.
    """
    return check_text(repr(key), row.get(key))


def shown(text: str) -> str:
    """Return the beginning of a word from a file, quoted, for an error message."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def line_row(line: bytes) -> dict[str, Any]:
    """Return the object of a line of JSONL.

    Raises:
        InvalidInputError: If the line is no UTF-8 or no JSON object.
    """
    return _object(_decoded(line))


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"no JSON ({exc}).") from exc
    if not isinstance(row, dict):
        raise InvalidInputError(f"a JSON object is wanted, not {type(row).__name__}.")
    return row


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as exc:
        raise InvalidInputError(f"not UTF-8 ({exc.reason} at byte {exc.start}); convert the file.") from exc
