"""Retrieval data sets of the Hugging Face hub in the layout that mteb and BEIR use, pinned to one commit, no code of theirs run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_rerank.documents import FileError, Qrels
from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.evaluation.collection import Collection, assemble
from qwen_rerank.types import Document

try:
    import datasets
    from huggingface_hub import HfApi
except ImportError as exc:
    raise MissingExtraError("load_hub", package="datasets", extra="hub", cause=exc) from exc

log = logging.getLogger(__name__)

# A hub data set holds three tables; their names differ between the two usual layouts.
_CORPUS, _QUERIES, _QRELS = ("corpus",), ("queries", "query"), ("default", "qrels")
Row = Mapping[str, Any]


def load_hub(name: str, *, revision: str | None = None, split: str = "test") -> Collection:
    """Download a retrieval data set, e.g. `mteb/scifact`: tables of corpus, queries and judgements.

    All tables are read at one commit, which stands in the collection's notes: give it as `revision` to measure on the same data
    again. Only data files are read (Parquet, JSON, CSV); a data set that needs code of its own is refused by `datasets`.

    Args:
        name: `owner/name`, or a folder with a copy.
        revision: Commit, tag or branch; None for the newest commit.
        split: Of the judgements.

    Raises:
        InvalidInputError: If the hub cannot be reached, or the data set is not there or has another layout.
    """
    commit = None if Path(name).is_dir() else _commit(name, revision)
    try:
        known = datasets.get_dataset_config_names(name, revision=commit)
        corpus, queries, qrels = (_table(name, commit, known, names, split) for names in (_CORPUS, _QUERIES, _QRELS))
    except InvalidInputError:
        raise
    except Exception as exc:  # the hub's clients have no common base for their errors
        raise InvalidInputError(
            f"the data set {name!r} cannot be read ({_first_line(exc)}); see: qwen-rerank help hub"
        ) from exc
    collection = assemble(
        name.rstrip("/").rsplit("/", 1)[-1],
        split,
        _documents(name, corpus),
        _texts(name, queries),
        _judged(name, qrels),
        source=name,
    )
    if commit is None:
        return collection
    note = f"read from the hub: {name}@{commit}"
    log.info(note)
    return Collection(
        collection.name, split, collection.documents, collection.queries, collection.qrels, (*collection.notes, note)
    )


def _commit(name: str, revision: str | None) -> str:
    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except Exception as exc:  # the hub's clients have no common base for their errors
        raise InvalidInputError(
            f"the data set {name!r} cannot be found on the hub ({_first_line(exc)}); see: qwen-rerank help hub"
        ) from exc
    if commit is None:
        raise InvalidInputError(f"the hub names no commit of the data set {name!r}; give one: {name}@commit.")
    return str(commit)


def _table(name: str, commit: str | None, known: list[str], wanted: tuple[str, ...], split: str) -> Iterable[Row]:
    """Return the rows of the first of the `wanted` tables that the data set has, in the split or the only one there is."""
    table = next((candidate for candidate in wanted if candidate in known), None)
    if table is None:
        raise InvalidInputError(
            f"the data set {name!r} has the tables {', '.join(sorted(known))} and no {' or '.join(wanted)}; "
            "a retrieval data set has corpus, queries and default (or qrels)."
        )
    splits = datasets.get_dataset_split_names(name, table, revision=commit)
    if split not in splits and len(splits) > 1:
        raise InvalidInputError(f"table {table!r} of {name!r} has the splits {', '.join(splits)}, not {split!r}.")
    rows: Iterable[Row] = datasets.load_dataset(
        name, table, split=split if split in splits else splits[0], revision=commit
    )
    return rows


def _documents(name: str, rows: Iterable[Row]) -> list[Document]:
    documents = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        document_id, text = _id(name, "corpus", number, row), row.get("text")
        if not isinstance(text, str) or document_id in seen:
            raise FileError(f"{name} corpus", number, "a document has no text, or an id that occurred before.")
        seen.add(document_id)
        title = row.get("title")
        documents.append(Document(document_id, f"{title}\n{text}" if title else text))
    return documents


def _texts(name: str, rows: Iterable[Row]) -> dict[str, str]:
    queries: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        query, text = _id(name, "queries", number, row), row.get("text")
        if not isinstance(text, str) or not text.strip() or query in queries:
            raise FileError(f"{name} queries", number, "a query has no text, or an id that occurred before.")
        queries[query] = text
    return queries


def _judged(name: str, rows: Iterable[Row]) -> Qrels:
    qrels: Qrels = {}
    for number, row in enumerate(rows, start=1):
        try:
            query, document, grade = str(row["query-id"]), str(row["corpus-id"]), float(row["score"])
        except (KeyError, TypeError, ValueError) as exc:
            raise FileError(f"{name} qrels", number, "a judgement needs query-id, corpus-id and score.") from exc
        if not grade.is_integer() or grade < 0 or document in qrels.get(query, {}):
            raise FileError(f"{name} qrels", number, f"the grade {grade} is no integer of at least 0, or a second one.")
        qrels.setdefault(query, {})[document] = int(grade)
    return qrels


def _id(name: str, table: str, number: int, row: Row) -> str:
    value = row.get("_id", row.get("id"))
    if not isinstance(value, str | int) or value == "":
        raise FileError(f"{name} {table}", number, "a row has no _id.")
    return str(value)


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:200]
