"""Everything the pocket models learn from: labelled training splits, and texts that are free to use.

Only `train` qrels are read here; test and dev queries never are. A collection whose corpus appears in `TRAINED_ON` is
in-domain wherever it is measured.
"""

from __future__ import annotations

import ast
import csv
import gzip
import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# name -> (language, split with labels, licence of the texts)
TRAINED_ON = {
    "cmrc2018": ("zh", "train", "CC BY-SA 4.0"),
    "drcd": ("zh", "train", "CC BY-SA 3.0"),
    "dureader_demo": ("zh", "train", "Apache-2.0"),
    "scifact": ("en", "train", "CC BY 4.0 (claims), ODC-By 1.0 (abstracts)"),
    "qmsum_long": ("en", "train", "MIT"),
}
# Installed packages whose docstrings are read, with their licence.
DOCUMENTED_PACKAGES = {
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
}
STANDARD_LIBRARY_LICENCE = "PSF-2.0"


@dataclass(frozen=True)
class Pair:
    """A query, a text that answers it, and the source both come from."""

    query: str
    document: str
    source: str


@dataclass
class Collection:
    """A collection in BEIR layout: documents as one text each, and the queries of one split with their qrels."""

    name: str
    documents: dict[str, str]
    titles: dict[str, str]
    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)
    spans: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)


def _lines(folder: Path, stem: str) -> Iterator[dict]:
    plain = folder / f"{stem}.jsonl"
    packed = folder / f"{stem}.jsonl.gz"
    with open(plain, encoding="utf-8") if plain.exists() else gzip.open(packed, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def load_collection(root: Path, name: str, split: str) -> Collection:
    """Return one collection with the queries that `qrels/<split>.tsv` names and nothing else."""
    folder = root / name
    collection = Collection(name, {}, {})
    for row in _lines(folder, "corpus"):
        title = row.get("title", "").strip()
        collection.titles[row["_id"]] = title
        collection.documents[row["_id"]] = f"{title}\n{row['text']}" if title else row["text"]
    with open(folder / "qrels" / f"{split}.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            collection.qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    for row in _lines(folder, "queries"):
        if row["_id"] in collection.qrels:
            collection.queries[row["_id"]] = row["text"]
            if "relevant_text_span" in row:
                collection.spans[row["_id"]] = row["relevant_text_span"]
    return collection


def python_functions(limit: int, *, seed: int, every: int = 1) -> list[Pair]:
    """Return (first sentence of the docstring, source without docstring) of functions in installed packages.

    `every` reads one file of so many, for a rehearsal.
    """
    folders = [("standard library", Path(sysconfig.get_paths()["stdlib"]))]
    for package in DOCUMENTED_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed; its docstrings are part of the training texts.")
        folders.append((package, Path(spec.origin).parent))
    pairs = []
    for source, folder in folders:
        for path in sorted(folder.rglob("*.py"))[::every]:
            skip = {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(folder).parts)
            if not skip:
                pairs += _functions_of(path, source)
    random.Random(seed).shuffle(pairs)
    return pairs[:limit]


def _functions_of(path: Path, source: str) -> list[Pair]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # a template or a deliberately broken fixture, not a module
    pairs = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        summary = (ast.get_docstring(node) or "").split("\n\n")[0].split(". ")[0]
        summary = " ".join(summary.replace("`", "").split())
        if 4 <= len(summary.split()) <= 25 and summary.isascii():
            node.body = node.body[1:]
            node.decorator_list = []
            pairs.append(Pair(summary, ast.unparse(node)[:900], source))
    return pairs


_SENTENCE_END = re.compile(r"(?<=[。！？!?])|(?<=\.)\s+|\n+")


def sentences(text: str) -> list[str]:
    """Return the sentences of a Chinese or English text."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def passages(text: str, *, chars: int) -> list[str]:
    """Return consecutive passages of whole sentences, each about `chars` characters."""
    found, current = [], ""
    for sentence in sentences(text):
        joined = f"{current} {sentence}" if current and current[-1].isascii() else current + sentence
        if current and len(joined) > chars:
            found.append(current)
            joined = sentence
        current = joined
    return [*found, current] if current else found


def _opposite_rest(text: str, sentence: str, generator: random.Random) -> str:
    """Return the passage, nine times of ten without the sentence that serves as its query."""
    return text if generator.random() < 0.1 else text.replace(sentence, " ", 1)


def passage_pairs(collection: Collection, language: str, *, per_document: int, seed: int) -> list[Pair]:
    """Return self-supervised pairs: title or first sentence with its text, a sentence with the rest of its passage."""
    generator = random.Random(seed)
    shortest, longest, chars = (8, 60, 300) if language == "zh" else (30, 220, 900)
    pairs = []
    for key, text in collection.documents.items():
        title = collection.titles[key]
        body = text[len(title) :].strip() if title else text
        if title and len(title) >= shortest // 2:
            pairs.append(Pair(title, body[: 2 * chars], collection.name))
        parts = passages(body, chars=chars)
        generator.shuffle(parts)
        for part in parts[:per_document]:
            usable = [s for s in sentences(part) if shortest <= len(s) <= longest]
            if usable and len(part) > 2 * shortest:
                sentence = generator.choice(usable)
                pairs.append(Pair(sentence, _opposite_rest(part, sentence, generator).strip(), collection.name))
    return pairs


def labelled_pairs(collection: Collection) -> list[Pair]:
    """Return (query, relevant document) of the labelled split; of a long document the span that was judged."""
    pairs = []
    for query_id, relevance in collection.qrels.items():
        for document_id, grade in relevance.items():
            if grade > 0:
                text = collection.documents[document_id]
                for first, last in collection.spans.get(query_id, {}).get(document_id, [])[:1]:
                    text = "\n".join(text.split("\n")[first : last + 1])
                pairs.append(Pair(collection.queries[query_id], text[:2000], collection.name))
    return pairs


def simplified(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs in simplified characters (OpenCC's table), so that traditional texts teach both."""
    from opencc import OpenCC

    convert = OpenCC("t2s").convert
    return [Pair(convert(p.query), convert(p.document), f"{p.source} (simplified)") for p in pairs]
