"""Documents out of files: folders of .txt, .md, .jsonl and .csv; what cannot be read is named, counted and skipped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.types import Document, text_id

SUFFIXES = (".txt", ".md", ".jsonl", ".csv")
_TEXT_KEYS = ("text", "content", "contents")
_ID_KEYS = ("id", "_id")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that gave no document: where, as `file` or `file:line`, and why."""

    where: str
    reason: str


@dataclass(slots=True)
class Reading:
    """What a reading gave.

    Attributes:
        documents: In the order of the files, ids unique.
        skipped: Files and lines that gave no document.
        n_files: Files that were looked into.
    """

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    n_files: int = 0


def read_documents(paths: Iterable[Path]) -> Reading:
    """Read every document of `paths`, files or folders (searched through, hidden entries left out).

    A .txt or .md file is one document, its path the id. A .jsonl line is an object with `text` and optionally `id` (or
    `_id`), `title` and more, which becomes metadata; a .csv has a header with a `text` column, the rest is metadata.

    Raises:
        InvalidInputError: If a path does not exist, or a file named by itself has no known suffix.
    """
    reading = Reading()
    seen: set[str] = set()
    for root in paths:
        for path, name in _files(root):
            reading.n_files += 1
            for document in _read_file(path, name, reading.skipped):
                if document.id in seen:
                    reading.skipped.append(Skipped(name, f"the id {document.id!r} occurs twice"))
                    continue
                seen.add(document.id)
                reading.documents.append(document)
    return reading


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    if root.is_dir():
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") for part in relative.parts)
            if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
                yield path, relative.as_posix()
    elif not root.exists():
        raise InvalidInputError(f"{str(root)!r} does not exist; give a folder or a {', '.join(SUFFIXES)} file.")
    elif root.suffix.lower() not in SUFFIXES:
        raise InvalidInputError(f"{str(root)!r} is no {', '.join(SUFFIXES)} file; convert it to text first.")
    else:
        yield root, root.name


def _read_file(path: Path, name: str, skipped: list[Skipped]) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as exc:
        skipped.append(Skipped(name, f"it cannot be read ({exc.strerror})"))
        return
    except UnicodeDecodeError as exc:
        skipped.append(Skipped(name, f"it is not UTF-8 (byte {exc.start}); save it as UTF-8"))
        return
    match path.suffix.lower():
        case ".jsonl":
            yield from _read_jsonl(text, name, skipped)
        case ".csv":
            yield from _read_csv(text, name, skipped)
        case _ if text.strip():
            yield Document(name, text, {"source": name})
        case _:
            skipped.append(Skipped(name, "the file is empty"))


def _read_jsonl(text: str, name: str, skipped: list[Skipped]) -> Iterator[Document]:
    # Split at line feeds alone: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            skipped.append(Skipped(where, f"it is no JSON ({exc})"))
            continue
        if not isinstance(row, dict):
            skipped.append(Skipped(where, f"a JSON object is wanted, not {type(row).__name__}"))
            continue
        yield from _from_row(row, where, skipped)


def _read_csv(text: str, name: str, skipped: list[Skipped]) -> Iterator[Document]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            known = {key: value for key, value in row.items() if key is not None and value is not None}
            yield from _from_row(known, f"{name}:{rows.line_num}", skipped)
    except csv.Error as exc:
        skipped.append(Skipped(f"{name}:{rows.line_num}", f"no CSV from here on ({exc})"))


def _from_row(row: dict[str, Any], where: str, skipped: list[Skipped]) -> Iterator[Document]:
    text_key = next((key for key in _TEXT_KEYS if isinstance(row.get(key), str)), None)
    body = row[text_key] if text_key else ""
    title = row.get("title")
    text = f"{title}\n{body}" if isinstance(title, str) and title.strip() else body
    if not text.strip():
        skipped.append(Skipped(where, f"no text under any of {', '.join(map(repr, _TEXT_KEYS))}"))
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        skipped.append(Skipped(where, "the text holds a lone surrogate"))
        return
    given = next((row[key] for key in _ID_KEYS if row.get(key) not in (None, "")), None)
    metadata = {key: value for key, value in row.items() if key not in (*_ID_KEYS, text_key, "metadata")}
    nested = row.get("metadata")
    yield Document(
        str(given) if given is not None else text_id(text),
        text,
        {**metadata, **(nested if isinstance(nested, dict) else {}), "source": where},
    )
