"""Documents out of files: what a reading of them gives, and the corpus of a test collection."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qwen_rerank.documents.reader import Row, Skipped, Source, TextFile, text_of
from qwen_rerank.errors import FileError, InvalidInputError
from qwen_rerank.types import Document, text_id

log = logging.getLogger(__name__)

_TEXT_KEYS = ("text", "content", "contents")
_ID_KEYS = ("id", "_id")


@dataclass(slots=True)
class Reading:
    """The documents that were read, and what was skipped.

    Attributes:
        documents: In the order of the files, ids unique.
        skipped: Files and lines that gave no document.
        n_files: Files that were looked into.
    """

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    n_files: int = 0


def read_corpus(path: str | os.PathLike[str], *, skipped: list[Skipped] | None = None) -> list[Document]:
    """Read `{"_id", "title", "text", …}` lines; the text of a document is its title and text, other keys are metadata.

    Args:
        path: A JSONL file, plain or gzip.
        skipped: Gets the lines that cannot be used; None makes them errors.

    Raises:
        FileError: If a line cannot be used, or there is no document.
    """
    file = TextFile(path, skipped=skipped)
    documents = corpus_of(file, file.objects())
    log.info("%s: %d documents used", file.path, len(documents))
    return documents


def corpus_of(source: Source, rows: Iterable[tuple[int, Row]]) -> list[Document]:
    """Return the documents of rows as `read_corpus` takes them, each id once.

    Raises:
        FileError: If a row cannot be used, where nothing may be skipped, or there is no document.
    """
    found = source.unique(source.each(rows, _corpus_document), _key, "the id {0} occurs twice.")
    documents = [document for _, document in found]
    if not documents:
        raise FileError(source.place, None, "holds no document.")
    return documents


def _key(document: Document) -> tuple[str]:
    return (document.id,)


def find_table(folder: Path, stem: str) -> Path:
    """Return `corpus` or `queries` of a folder in BEIR layout, a JSONL file, plain or gzip.

    Raises:
        FileError: If there is none.
    """
    for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"):
        if path.is_file():
            return path
    raise FileError(folder, None, f"holds no {stem}.jsonl or {stem}.jsonl.gz.")


def document_of(row: Row) -> Document:
    """Return the document of a row with `text` (or `content`) and optionally `id` (or `_id`), `title` and metadata.

    Raises:
        InvalidInputError: If the row has no text.
    """
    text_key = next((key for key in _TEXT_KEYS if isinstance(row.get(key), str)), None)
    title = row.get("title")
    text = _titled(title if isinstance(title, str) else "", text_of(row, text_key) if text_key else "")
    if not text.strip():
        raise InvalidInputError(f"no text under any of {', '.join(map(repr, _TEXT_KEYS))}.")
    given = next((row[key] for key in _ID_KEYS if row.get(key) not in (None, "")), None)
    metadata = {key: value for key, value in row.items() if key not in (*_ID_KEYS, text_key, "metadata")}
    nested = row.get("metadata")
    return Document(
        text_id(text) if given is None else str(given),
        text,
        {**metadata, **(nested if isinstance(nested, dict) else {})},
    )


def _corpus_document(row: Row) -> Document:
    title = text_of(row, "title") if row.get("title") is not None else ""
    metadata = {key: value for key, value in row.items() if key not in ("_id", "text")}
    return Document(text_of(row, "_id"), _titled(title, text_of(row, "text")), metadata)


def _titled(title: str, text: str) -> str:
    return f"{title}\n{text}" if title.strip() else text
