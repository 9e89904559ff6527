"""Files of every kind to sections: a function for each kind of text, and the table that says which suffix is which."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders import office, sections
from qwen_rerank.folders.encodings import is_binary
from qwen_rerank.folders.kinds import Converted, Kind, Limits, decoded
from qwen_rerank.folders.mail import read_mail
from qwen_rerank.folders.sections import Section
from qwen_rerank.folders.tables import Refusals, csv_rows, json_rows, row_sections
from qwen_rerank.regular_files import open_regular

_HEAD_BYTES = 4096


def _of_text(cut: Callable[[str], list[Section]]) -> Callable[[bytes, str | None, Limits], Converted]:
    def convert(data: bytes, text_column: str | None, limits: Limits) -> Converted:
        text, notes = decoded(data)
        return Converted(cut(text), notes, [])

    return convert


def _of_rows(rows: Callable[..., Iterator[tuple[int, dict[str, Any]]]]) -> Callable[..., Converted]:
    def convert(data: bytes, text_column: str | None, limits: Limits) -> Converted:
        text, notes = decoded(data)
        refusals = Refusals()
        found = list(row_sections(rows(text, refusals), refusals, text_column=text_column))
        if not found and refusals.rows:
            raise InvalidInputError(refusals.rows[0][1])
        return Converted(found, notes, refusals.rows, refusals.count)

    return convert


def _notebook(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    text, notes = decoded(data)
    try:
        cells = json.loads(text)["cells"]
        parts = [(n, cell["cell_type"], "".join(cell["source"])) for n, cell in enumerate(cells, start=1)]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise InvalidInputError(f"no notebook ({type(exc).__name__}: {exc}).") from exc
    found: list[Section] = []
    above: tuple[str, ...] = ()
    for number, kind, source in parts:
        if kind == "markdown":
            below = [
                Section(one.text, one.heading or above, None, {"cell": number}) for one in sections.markdown(source)
            ]
            found += below
            above = below[-1].heading if below else above
        elif source.strip():
            found.append(Section(source, above, None, {"cell": number}))
    return Converted(found, notes, [])


_LONG = Limits(seconds=120.0)
_TEXT = Limits(file_bytes=16 * 1024**2, seconds=None)
PLAIN = Kind("text", _of_text(sections.plain), _TEXT)
CODE = Kind("code", _of_text(sections.code), _TEXT)
_MARKDOWN = Kind("Markdown", _of_text(sections.markdown), _TEXT)
_HTML = Kind("HTML", office.read_html, Limits(file_bytes=16 * 1024**2, seconds=60.0), outside=True)
_CSV = Kind("table", _of_rows(csv_rows), Limits())
_JSONL = Kind("JSON lines", _of_rows(json_rows), Limits())

KINDS: dict[str, Kind] = {
    **dict.fromkeys((".md", ".markdown", ".mdx", ".qmd"), _MARKDOWN),
    **dict.fromkeys((".rst", ".rest"), Kind("reStructuredText", _of_text(sections.restructured), _TEXT)),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _HTML),
    **dict.fromkeys((".csv", ".tsv"), _CSV),
    **dict.fromkeys((".jsonl", ".ndjson"), _JSONL),
    ".ipynb": Kind("notebook", _notebook, _TEXT),
    ".pdf": Kind("PDF", office.read_pdf, Limits(file_bytes=256 * 1024**2, seconds=120.0), outside=True),
    ".docx": Kind("Word", office.read_docx, _LONG, outside=True),
    ".pptx": Kind("slides", office.read_pptx, _LONG, outside=True),
    ".xlsx": Kind("spreadsheet", office.read_xlsx, _LONG, outside=True),
    ".eml": Kind("mail", read_mail, Limits(seconds=60.0), outside=True),
    ".epub": Kind("book", office.read_epub, _LONG, outside=True),
    **dict.fromkeys(
        (
            ".py",
            ".pyi",
            ".js",
            ".mjs",
            ".ts",
            ".tsx",
            ".jsx",
            ".java",
            ".kt",
            ".scala",
            ".go",
            ".rs",
            ".c",
            ".h",
            ".cc",
            ".cpp",
            ".hpp",
            ".cs",
            ".swift",
            ".rb",
            ".php",
            ".pl",
            ".lua",
            ".r",
            ".jl",
            ".sql",
            ".sh",
            ".ps1",
            ".dart",
        ),
        CODE,
    ),
}


def kind_of(path: Path, head: bytes) -> Kind | None:
    """Return the kind of a file by its suffix, or plain text where its first bytes are text; None for the rest."""
    known = KINDS.get(path.suffix.lower())
    if known is not None:
        return known
    return None if is_binary(head) or not _is_text(head) else PLAIN


def read_of_kind(
    path: Path, *, links: bool, most: Callable[[Kind], int] = lambda kind: kind.limits.file_bytes
) -> tuple[Kind | None, bytes]:
    """Return a file's kind and its content; of one that is of no kind only the first bytes.

    Raises:
        OSError: If it cannot be read, or is no regular file.
        InvalidInputError: If it has more bytes than `most` says of its kind; then nothing of it is read.
    """
    with open_regular(path, links=links) as file:
        head = file.read(_HEAD_BYTES)
        kind = kind_of(path, head)
        if kind is None:
            return None, head
        size = os.fstat(file.fileno()).st_size
        if size > most(kind):
            raise InvalidInputError(f"{size} bytes; of this kind at most {most(kind)} are read.")
        return kind, head + file.read(max(0, size - len(head)))


def _is_text(head: bytes) -> bool:
    """Return whether a head is UTF-8, up to a character that is cut in two, or has hardly a control character."""
    try:
        head.decode()
    except UnicodeDecodeError as exc:
        if exc.start < len(head) - 3:
            controls = sum(byte < 32 and byte not in b"\t\r\n\f\x1b" for byte in head)
            return controls == 0
    return True
