"""A test collection: documents, queries and judgements from where they lie, with an account of what was used."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_rerank.checks import check_count
from qwen_rerank.documents import Qrels, read_corpus, read_qrels, read_queries
from qwen_rerank.documents.judgements import split_file
from qwen_rerank.documents.reader import Row, TextFile, shown, text_of
from qwen_rerank.documents.texts import find_table
from qwen_rerank.errors import FileError, InvalidInputError
from qwen_rerank.folders import read_files
from qwen_rerank.types import Document, text_id

log = logging.getLogger(__name__)

HUB = "hub:"


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, queries and judgements, on which retrieval is measured.

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


def load_collection(
    source: str,
    *,
    split: str = "test",
    labels: Path | None = None,
    topics: Path | None = None,
    qrels: Path | None = None,
) -> Collection:
    """Return the collection that the arguments name.

    Args:
        source: A folder in BEIR layout; `hub:owner/name@revision`; or, with `labels` or `topics` and `qrels`, a file or folder of
            documents (.txt, .md, .jsonl, .csv).
        split: Of the judgements, in a BEIR folder or hub data set.
        labels: JSONL of `{"query": …, "relevant": [document ids]}`.
        topics: TREC topics, or `id<tab>text` lines, or JSONL.
        qrels: TREC or BEIR judgements.

    Raises:
        InvalidInputError: If the arguments do not belong together, or a file is wrong.
    """
    if labels is not None and (topics is not None or qrels is not None):
        raise InvalidInputError("give labels, or topics and qrels, not both.")
    if (topics is None) != (qrels is None):
        raise InvalidInputError("topics and qrels belong together: give both.")
    if labels is not None:
        return load_pairs(labels, _documents(source), name=_name(source))
    if topics is not None and qrels is not None:
        return load_trec(_documents(source), topics, qrels, name=_name(source))
    if source.startswith(HUB):
        from qwen_rerank.evaluation.hub import load_hub

        name, _, revision = source.removeprefix(HUB).partition("@")
        return load_hub(name, revision=revision or None, split=split)
    if not Path(source).is_dir():
        raise InvalidInputError(
            f"{source!r} is no folder; give a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/), "
            f"documents with --labels, or {HUB}owner/name."
        )
    return load_beir(source, split=split)


def load_beir(folder: str | os.PathLike[str], *, split: str = "test") -> Collection:
    """Read a folder in BEIR layout: `corpus.jsonl[.gz]`, `queries.jsonl[.gz]`, `qrels/<split>.tsv`.

    Queries without a positive judgement are left out, as they can only score 0, and so are judgements of documents that
    are not in the corpus; both are counted in `notes`.

    Raises:
        FileError: If a file is missing or a line is wrong, or a judged query has no text.
    """
    root = Path(folder)
    documents = read_corpus(find_table(root, "corpus"))
    queries = read_queries(find_table(root, "queries"))
    qrels = split_file(root, split).path
    return assemble(root.resolve().name, split, documents, queries, read_qrels(qrels), source=str(qrels))


def load_trec(
    documents: list[Document],
    topics: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    name: str | None = None,
) -> Collection:
    """Read TREC topics (or `id<tab>text` lines, or JSONL) and TREC or BEIR judgements over `documents`.

    Raises:
        FileError: If a line is wrong, or a judged query has no text.
    """
    queries, judgements = read_queries(topics), read_qrels(qrels)
    return assemble(name or Path(qrels).stem, "test", documents, queries, judgements, source=str(qrels))


def load_pairs(path: str | os.PathLike[str], documents: list[Document], *, name: str | None = None) -> Collection:
    """Read labels of your own, `{"query": …, "relevant": [document ids]}` lines, over `documents`.

    Raises:
        FileError: If a line is wrong, or a query occurs twice.
    """
    file = TextFile(path)
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    for number, (text, relevant) in file.each(file.objects(), _pair):
        query = text_id(text)
        if query in queries:
            file.refuse(number, f"the query {shown(text)} occurs twice.")
        queries[query] = text
        qrels[query] = dict.fromkeys(relevant, 1)
    return assemble(name or file.path.stem, "test", documents, queries, qrels, source=str(path))


def _pair(row: Row) -> tuple[str, list[str]]:
    text, relevant = text_of(row, "query"), row.get("relevant")
    if not text.strip():
        raise InvalidInputError("the query is empty.")
    if not isinstance(relevant, list) or not relevant or not all(isinstance(item, str) for item in relevant):
        raise InvalidInputError("'relevant' must be a list of document ids.")
    return text, relevant


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
        FileError: If a judged query has no text, or no query has a relevant document.
    """
    known = {document.id for document in documents}
    unknown = sum(doc not in known for judged in qrels.values() for doc in judged)
    present = {q: {doc: grade for doc, grade in judged.items() if doc in known} for q, judged in qrels.items()}
    used = {query: judged for query, judged in present.items() if any(grade > 0 for grade in judged.values())}
    if missing := [query for query in used if query not in queries]:
        raise FileError(source, None, f"{len(missing)} judged queries have no text, the first is {missing[0]!r}.")
    if not used:
        raise FileError(source, None, "no query has a relevant document in the corpus.")
    notes = []
    if unknown:
        notes.append(f"{unknown} judgements of documents that are not in the corpus ignored")
    if len(used) < len(qrels):
        notes.append(f"{len(qrels) - len(used)} queries without a relevant document ignored")
    if extra := len(queries) - sum(query in queries for query in qrels):
        notes.append(f"{extra} queries without judgements ignored")
    return Collection(name, split, documents, {query: queries[query] for query in used}, used, tuple(notes))


def _name(source: str) -> str:
    return Path(source).resolve().stem


def _documents(source: str) -> list[Document]:
    reading = read_files([source])
    for skipped in reading.skipped:
        log.warning("%s: skipped, %s", skipped.where, skipped.reason)
    log.info("%s: %d documents used, %d skipped", source, len(reading.documents), len(reading.skipped))
    if not reading.documents:
        raise InvalidInputError(f"{source!r} holds no document.")
    return reading.documents
