"""Distinct passages of real text by the million: sentences and windows of the test collections, documentation of packages."""

from __future__ import annotations

import ast
import gzip
import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qwen_rerank import Document

_SENTENCE = re.compile(r"(?<=[.!?。！？])\s*(?=\S)|\n+")
_CHARS = (20, 1500)  # shortest and longest passage
_WINDOWS = (1, 2, 3, 5)  # sentences


def passages(data: Path, limit: int) -> list[str]:
    """Return `limit` distinct passages, or as many as there are: of the collections in `data`, then of packages."""
    seen: dict[str, None] = {}
    for text in _all(data):
        if _CHARS[0] <= len(text) <= _CHARS[1]:
            seen.setdefault(text)
        if len(seen) == limit:
            break
    return list(seen)


def _all(data: Path) -> Iterator[str]:
    for size in _WINDOWS:
        for text in collection_texts(data):
            yield from _windows(text, size)
    for size in _WINDOWS:
        for text in documentation():
            yield from _windows(text, size)


def _windows(text: str, size: int) -> Iterator[str]:
    sentences = [part.strip() for part in _SENTENCE.split(text) if part.strip()]
    for start in range(max(1, len(sentences) - size + 1)):
        yield " ".join(sentences[start : start + size])


def collection_texts(data: Path) -> Iterator[str]:
    """Yield every document of every collection."""
    for folder in sorted(data.iterdir()):
        for name in ("corpus.jsonl", "corpus.jsonl.gz"):
            path = folder / name
            if path.exists():
                with (gzip.open if name.endswith("gz") else open)(path, "rt", encoding="utf-8") as lines:
                    for line in lines:
                        row = json.loads(line)
                        yield f"{row.get('title', '')} {row['text']}".strip()
                break


def documentation() -> Iterator[str]:
    """Yield the docstrings of installed packages and the standard library, and their texts in Markdown and reST."""
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in (".py", ".pyi", ".md", ".rst", ".txt") or not path.is_file():
                continue
            try:
                text = path.read_text(encoding="utf-8")
                yield from _docstrings(text) if path.suffix.startswith(".py") else [text]
            except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
                continue


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def queries(data: Path, limit: int) -> list[str]:
    """Return queries of the collections, taken from all of them in turn."""
    sources = [
        iter([json.loads(line)["text"] for line in path.open(encoding="utf-8")])
        for path in sorted(data.glob("*/queries.jsonl"))
    ]
    found: list[str] = []
    while sources and len(found) < limit:
        for source in list(sources):
            taken = list(islice(source, 1))
            found += taken
            if not taken:
                sources.remove(source)
    return found[:limit]


def read_collection(folder: Path, split: str) -> tuple[list[Document], dict[str, str], dict[str, dict[str, int]]]:
    """Return documents, queries and judgements of one collection; queries without a relevant document are left out."""
    plain, packed = folder / "corpus.jsonl", folder / "corpus.jsonl.gz"
    corpus = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    rows = map(json.loads, corpus.splitlines())
    documents = [Document(row["_id"], f"{row.get('title', '')} {row['text']}".strip()) for row in rows]
    lines = (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {row["_id"]: row["text"] for row in map(json.loads, lines)}
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        qrels.setdefault(query, {})[document] = int(grade)
    return documents, texts, {query: judged for query, judged in qrels.items() if any(g > 0 for g in judged.values())}
