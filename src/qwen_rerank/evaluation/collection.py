"""A test collection: documents, queries and judgements, with an account of what was used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_rerank.checks import check_count
from qwen_rerank.evaluation.files import (
    EvalFileError,
    Qrels,
    read_corpus,
    read_objects,
    read_qrels,
    shown,
    text_of,
)
from qwen_rerank.evaluation.topics import read_queries
from qwen_rerank.types import Document, text_id


@dataclass(frozen=True, slots=True)
class Collection:
    """What retrieval is measured on.

    Attributes:
        name: Short name.
        split: Name of the split, e.g. "test".
        documents: The whole corpus.
        queries: Query id to text, only those with a judgement.
        qrels: Query id to document id to grade.
        notes: What was left out and why, for people to read.
    """

    name: str
    split: str
    documents: list[Document]
    queries: Mapping[str, str]
    qrels: Qrels
    notes: tuple[str, ...] = ()

    def head(self, n_queries: int) -> Collection:
        """Return the same corpus with only the first `n_queries` judged queries."""
        check_count("n_queries", n_queries)
        kept = dict(list(self.queries.items())[:n_queries])
        qrels = {query: self.qrels[query] for query in kept}
        note = f"only the first {len(kept)} of {len(self.queries)} queries"
        return Collection(self.name, self.split, self.documents, kept, qrels, (*self.notes, note))


def load_beir(folder: str | os.PathLike[str], *, split: str = "test") -> Collection:
    """Read a folder in BEIR layout: `corpus.jsonl[.gz]`, `queries.jsonl[.gz]`, `qrels/<split>.tsv`.

    Queries without a positive judgement are left out, as they can only score 0, and so are judgements of documents that
    are not in the corpus; both are counted in `notes`.

    Raises:
        EvalFileError: If a file is missing or a line is wrong, or a judged query has no text.
    """
    root = Path(folder)
    documents = read_corpus(_one_of(root, "corpus.jsonl", "corpus.jsonl.gz"))
    queries = read_queries(_one_of(root, "queries.jsonl", "queries.jsonl.gz"))
    qrels_file = root / "qrels" / f"{split}.tsv"
    if not qrels_file.is_file():
        splits = sorted(path.stem for path in (root / "qrels").glob("*.tsv"))
        raise EvalFileError(qrels_file, None, f"no such split; there are: {', '.join(splits) or 'none'}.")
    return assemble(root.resolve().name, split, documents, queries, read_qrels(qrels_file), source=str(qrels_file))


def load_trec(
    documents: list[Document],
    topics: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    name: str | None = None,
) -> Collection:
    """Read TREC topics (or `id<tab>text` lines, or JSONL) and TREC or BEIR judgements over `documents`.

    Raises:
        EvalFileError: If a line is wrong, or a judged query has no text.
    """
    queries, judgements = read_queries(topics), read_qrels(qrels)
    return assemble(name or Path(qrels).stem, "test", documents, queries, judgements, source=str(qrels))


def load_pairs(path: str | os.PathLike[str], documents: list[Document], *, name: str | None = None) -> Collection:
    """Read labels of your own, `{"query": …, "relevant": [document ids]}` lines, over `documents`.

    Raises:
        EvalFileError: If a line is wrong, or a query occurs twice.
    """
    file = Path(path)
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    for number, row in read_objects(file):
        text = text_of(file, number, row, "query")
        if not text.strip():
            raise EvalFileError(file, number, "the query is empty.")
        relevant = row.get("relevant")
        if not isinstance(relevant, list) or not relevant or not all(isinstance(item, str) for item in relevant):
            raise EvalFileError(file, number, "'relevant' must be a list of document ids.")
        query = text_id(text)
        if query in queries:
            raise EvalFileError(file, number, f"the query {shown(text)} occurs twice.")
        queries[query] = text
        qrels[query] = dict.fromkeys(relevant, 1)
    return assemble(name or file.stem, "test", documents, queries, qrels, source=str(file))


def _one_of(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    raise EvalFileError(root, None, f"holds no {' or '.join(names)}.")


def assemble(
    name: str,
    split: str,
    documents: list[Document],
    queries: Mapping[str, str],
    qrels: Qrels,
    *,
    source: str,
) -> Collection:
    """Join documents, queries and judgements into a collection and count in its notes what could not be used.

    Args:
        name: Short name.
        split: Name of the split.
        documents: The whole corpus.
        queries: Query id to text; those without judgements are left out.
        qrels: Judgements; those of unknown documents, and queries without a relevant document, are left out.
        source: Where the judgements come from, for error messages.

    Raises:
        EvalFileError: If a judged query has no text, or no query has a relevant document.
    """
    known = {document.id for document in documents}
    unknown = sum(doc not in known for judged in qrels.values() for doc in judged)
    present = {q: {doc: grade for doc, grade in judged.items() if doc in known} for q, judged in qrels.items()}
    used = {query: judged for query, judged in present.items() if any(grade > 0 for grade in judged.values())}
    if missing := [query for query in used if query not in queries]:
        raise EvalFileError(source, None, f"{len(missing)} judged queries have no text, the first is {missing[0]!r}.")
    if not used:
        raise EvalFileError(source, None, "no query has a relevant document in the corpus.")
    notes = []
    if unknown:
        notes.append(f"{unknown} judgements of documents that are not in the corpus ignored")
    if len(used) < len(qrels):
        notes.append(f"{len(qrels) - len(used)} queries without a relevant document ignored")
    if extra := len(queries) - sum(query in queries for query in qrels):
        notes.append(f"{extra} queries without judgements ignored")
    return Collection(name, split, documents, {query: queries[query] for query in used}, used, tuple(notes))
