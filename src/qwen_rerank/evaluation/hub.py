"""Retrieval data sets of the Hugging Face hub in the layout that mteb and BEIR use, pinned to one commit, no code of theirs run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from qwen_rerank.documents.judgements import Judgement, qrels_of
from qwen_rerank.documents.queries import id_and_text, queries_of
from qwen_rerank.documents.reader import Row, Source
from qwen_rerank.documents.texts import corpus_of
from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.evaluation.collection import Collection, assemble
from qwen_rerank.models.names import first_line

try:
    import datasets
    from huggingface_hub import HfApi
except ImportError as exc:
    raise MissingExtraError("load_hub", package="datasets", extra="hub", cause=exc) from exc

log = logging.getLogger(__name__)

# A hub data set holds three tables; their names differ between the two usual layouts.
_CORPUS, _QUERIES, _QRELS = ("corpus",), ("queries", "query"), ("default", "qrels")


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
            f"the data set {name!r} cannot be read ({first_line(exc)}); see: qwen-rerank help hub"
        ) from exc
    texts = Source(f"{name} queries", None, "queries")
    documents = corpus_of(Source(f"{name} corpus", None, "corpus"), map(_with_id, enumerate(corpus, start=1)))
    judged = Source(f"{name} qrels", None, "qrels")
    collection = assemble(
        name.rstrip("/").rsplit("/", 1)[-1],
        split,
        documents,
        queries_of(texts, texts.each(map(_with_id, enumerate(queries, start=1)), id_and_text)),
        qrels_of(judged, judged.each(enumerate(qrels, start=1), _judgement)),
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
            f"the data set {name!r} cannot be found on the hub ({first_line(exc)}); see: qwen-rerank help hub"
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


def _with_id(row: tuple[int, Row]) -> tuple[int, Row]:
    """Return a numbered row with the string under `_id` that some data sets have as a number, or under `id`."""
    number, values = row
    given = values.get("_id", values.get("id"))
    return number, {**values, "_id": str(given) if isinstance(given, int) else given}


def _judgement(row: Row) -> Judgement:
    try:
        query, document, grade = str(row["query-id"]), str(row["corpus-id"]), float(row["score"])
    except (KeyError, TypeError, ValueError) as exc:
        raise InvalidInputError("a judgement needs query-id, corpus-id and score.") from exc
    if not grade.is_integer() or grade < 0:
        raise InvalidInputError(f"the grade {grade} is no integer of at least 0.")
    return query, document, int(grade)
