"""Files of every kind to documents, whole: one a file, or one a row of a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_rerank.checks import check_text
from qwen_rerank.documents import Reading, Skipped
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.converters import read_of_kind
from qwen_rerank.folders.kinds import Kind
from qwen_rerank.folders.records import resolve_paths
from qwen_rerank.folders.sections import Section
from qwen_rerank.folders.walk import Found, Selection, shown, walk
from qwen_rerank.folders.worker import Converter
from qwen_rerank.types import Document, text_id

_TABLE_BYTES = 4 * 1024**3  # all rows become documents in memory, so that is what bounds a table
_ID_COLUMNS = ("id", "_id")


def read_files(paths: Iterable[str | os.PathLike[str]], *, text_column: str | None = None) -> Reading:
    """Return a document for each file, its id the path below the folder that was named, and one for each row of a table.

    A row's id is its `id` or `_id`, else a hash of its text; its text is as `text_column` says, its other columns are
    metadata. `source` in the metadata is the file, with the row. What gives no document is in `skipped`.

    Args:
        paths: Folders or files.
        text_column: Column of tables that is read; None reads `text`, `content` or `contents`, else all columns.

    Raises:
        InvalidInputError: If a path does not exist, or an argument is wrong.
        MissingExtraError: If the package that reads a kind of file is not installed.
    """
    if text_column is not None:
        check_text("text_column", text_column)
    reading = Reading()
    documents: dict[str, Document] = {}
    with Converter(text_column=text_column) as converter:
        for root in resolve_paths(paths):
            base = root if root.is_dir() else root.parent
            for found in walk(base, root, Selection()):
                reading.n_files += 1
                for document in _documents_of(found, converter, reading.skipped):
                    source = document.metadata["source"]
                    if document.id not in documents:
                        documents[document.id] = document
                    elif document.id != source:
                        reading.skipped.append(Skipped(source, f"the id {document.id!r} occurs twice."))
                    else:  # a file of this name came from another folder
                        own = next(name for name in _names(base, found.name) if name not in documents)
                        documents[own] = Document(own, document.text, {**document.metadata, "source": own})
    reading.documents = list(documents.values())
    return reading


def _most_bytes(kind: Kind) -> int:
    return max(kind.limits.file_bytes, _TABLE_BYTES if kind.name in ("table", "JSON lines") else 0)


def _names(base: Path, name: str) -> Iterator[str]:
    yield from (f"{'/'.join(base.parts[-above:])}/{name}" for above in range(1, len(base.parts)))
    yield str(base / name)


def _documents_of(found: Found, converter: Converter, skipped: list[Skipped]) -> Iterator[Document]:
    name = shown(found.name)
    try:
        if found.reason is not None:
            raise InvalidInputError(found.reason)
        kind, data = read_of_kind(found.path, links=True, most=_most_bytes)
        if kind is None:
            suffix = found.path.suffix.lower()
            raise InvalidInputError(f"no kind that can be read{f' ({suffix})' if suffix else ''}")
        if not kind.outside:
            kind = replace(kind, limits=replace(kind.limits, file_bytes=_most_bytes(kind)))
        converted = converter.convert(found.path, kind, data)
    except (OSError, InvalidInputError) as exc:
        why = f"cannot be read ({exc})" if isinstance(exc, OSError) else str(exc)
        skipped.append(Skipped(name, why))
        return
    skipped += [Skipped(f"{name}:{row}", reason) for row, reason in converted.refused]
    if converted.n_refused > len(converted.refused):
        skipped.append(Skipped(name, f"{converted.n_refused - len(converted.refused)} more rows"))
    rows = [one for one in converted.sections if one.alone]
    if rows:
        yield from (_row_document(name, row) for row in rows)
        return
    text = "".join(one.text if one.line is not None else f"{one.text}\n\n" for one in converted.sections)
    if text.strip():
        yield Document(name, text if any(one.line for one in converted.sections) else text.strip(), {"source": name})
    elif not converted.refused:
        skipped.append(Skipped(name, "it has no text"))


def _row_document(name: str, row: Section) -> Document:
    columns: dict[str, Any] = dict(row.place["fields"])
    ids = (columns.get(key) for key in _ID_COLUMNS)
    given = next((one for one in ids if one != "" and type(one) in (str, int, float)), None)
    nested = columns.pop("metadata", None)
    kept = {key: value for key, value in columns.items() if key not in _ID_COLUMNS}
    kept |= nested if isinstance(nested, dict) else {} if nested is None else {"metadata": nested}
    place = row.line if row.line is not None else f"{row.place['sheet']}:{row.place['row']}"
    return Document(
        str(given) if given is not None else text_id(row.text), row.text, {**kept, "source": f"{name}:{place}"}
    )
