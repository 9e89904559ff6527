"""A file of text, gzip or plain, read within bounds; what is wrong in it stops the reading or is noted, as the caller wants."""

from __future__ import annotations

import csv
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


class TextFile:
    """A UTF-8 file, plain or gzip; a byte-order mark is left out.

    Args:
        path: The file.
        skipped: Gets what cannot be used, and the reading goes on behind it; None makes it a `FileError`.
        name: As `skipped` calls the file; its own name where it is None.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, skipped: list[Skipped] | None = None, name: str | None = None
    ) -> None:
        self.path = Path(path)
        self.skipped = skipped
        self.name = self.path.name if name is None else name

    def refuse(self, line: int | None, reason: str) -> None:
        """Say that a line, or with None the file, cannot be used.

        Raises:
            FileError: Where nothing may be skipped.
        """
        if self.skipped is None:
            raise FileError(self.path, line, reason)
        self.skipped.append(Skipped(self.name if line is None else f"{self.name}:{line}", reason))

    def text(self) -> str | None:
        """Return the whole content, or None where it cannot be read."""
        try:
            with self._open() as file:
                content = file.read(MAX_LINE_BYTES + 1)
            if len(content) <= MAX_LINE_BYTES:
                return content.decode("utf-8-sig")
            self.refuse(None, f"the text is longer than {MAX_LINE_BYTES} bytes.")
        except UnicodeDecodeError as exc:
            self.refuse(None, _not_utf8(exc))
        except (OSError, EOFError, zlib.error) as exc:
            self.refuse(None, f"cannot be read ({exc}).")
        return None

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield (line number from 1, line without its end) of every line that is not blank."""
        for number, line in self._lines():
            if line.strip():
                yield number, line.rstrip("\r\n")

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line number, object) of a JSONL file."""
        return self.each(self.lines(), _object)

    def table(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line number, column to value) of a CSV file with a header."""
        rows = csv.DictReader((line for _, line in self._lines()), strict=True)
        try:
            for row in rows:
                yield rows.line_num, {key: value for key, value in row.items() if key is not None and value is not None}
        except csv.Error as exc:
            self.refuse(rows.line_num, f"no CSV from here on ({exc}).")

    def each(self, rows: Iterable[tuple[int, T]], parse: Callable[[T], U]) -> Iterator[tuple[int, U]]:
        """Yield (line number, what `parse` makes of a row); its `InvalidInputError` refuses the row."""
        for number, row in rows:
            try:
                parsed = parse(row)
            except InvalidInputError as exc:
                self.refuse(number, str(exc))
            else:
                yield number, parsed

    def _lines(self) -> Iterator[tuple[int, str]]:
        number, total = 0, 0
        try:
            limit = self._most_bytes()
            with self._open() as file:
                while raw := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    total += len(raw)
                    if len(raw) > MAX_LINE_BYTES or total > limit:
                        long = f"the line is longer than {MAX_LINE_BYTES} bytes."
                        self.refuse(
                            number, long if len(raw) > MAX_LINE_BYTES else f"the file holds more than {limit} bytes."
                        )
                        return
                    try:
                        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as exc:
                        self.refuse(number, _not_utf8(exc))
                    else:
                        yield number, text
        except (OSError, EOFError, zlib.error) as exc:
            self.refuse(None, f"cannot be read ({exc}).")

    def _open(self) -> BinaryIO:
        return cast("BinaryIO", gzip.open(self.path, "rb")) if self.path.suffix == ".gz" else self.path.open("rb")

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


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"no JSON ({exc}).") from exc
    if not isinstance(row, dict):
        raise InvalidInputError(f"a JSON object is wanted, not {type(row).__name__}.")
    return row


def _not_utf8(exc: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({exc.reason} at byte {exc.start}); convert the file."
