"""Scores and candidates in the forms that other evaluators and spreadsheets read."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_rerank.documents import Run, write_whole
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.evaluation.measures import DEFAULT_MEASURES, measure

Cell = str | int | float
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def reranking_samples(collection: Collection, run: Run, *, depth: int) -> list[dict[str, Any]]:
    """Return `{"query", "positive", "documents"}` samples, as sentence-transformers' `CrossEncoderRerankingEvaluator` reads them.

    `documents` are the first stage's in its order, `positive` the relevant texts; a query without a relevant text is left out.
    """
    texts = {document.id: document.text for document in collection.documents}
    samples = []
    for query, text in collection.queries.items():
        positive = [texts[doc] for doc, grade in collection.qrels[query].items() if grade > 0]
        documents = [texts[doc] for doc, _ in run.get(query, [])[:depth]]
        if positive:
            samples.append({"query": text, "positive": positive, "documents": documents})
    return samples


def write_samples(collection: Collection, run: Run, path: str | os.PathLike[str], *, depth: int) -> int:
    """Write `{"query", "positive", "negative"}` lines and return how many.

    EvalScope's custom reranking task and the sentence-transformers evaluator read them. Negatives are the first stage's candidates that
    are not relevant, or not judged; a query without any is left out, because nothing can be ranked wrong in it.
    """
    rows = []
    for sample in reranking_samples(collection, run, depth=depth):
        relevant = set(sample["positive"])
        negative = [text for text in sample["documents"] if text not in relevant]
        if negative:
            rows.append({"query": sample["query"], "positive": sample["positive"], "negative": negative})
    write_whole("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
    return len(rows)


def write_predictions(
    run: Run, path: str | os.PathLike[str], *, model: str, split: str = "test", subset: str = "default"
) -> None:
    """Write a run's scores in the form of mteb's prediction files: subset → split → query → document → score.

    mteb's `convert_to_reranking`, and EvalScope's second stage through it, take the candidates from such a file. Scores fall strictly, so
    that the order is kept.
    """
    scores = {
        query: {document: float(len(hits) - place) for place, (document, _) in enumerate(hits)}
        for query, hits in run.items()
    }
    body = {"mteb_model_meta": {"model_name": model, "revision": "local"}, subset: {split: scores}}
    write_whole(json.dumps(body, ensure_ascii=False), path)


def write_per_query(
    collection: Collection,
    runs: Mapping[str, Run],
    path: str | os.PathLike[str],
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
) -> None:
    """Write a CSV with a row for each query: id, text, how many documents are judged and relevant, and every run's measures.

    Cells that a spreadsheet would run as a formula begin with an apostrophe.
    """
    head: list[Cell] = ["query-id", "query", "judged", "relevant"]
    rows: dict[str, list[Cell]] = {}
    for query, text in collection.queries.items():
        grades = collection.qrels[query].values()
        rows[query] = [query, text, len(grades), sum(grade > 0 for grade in grades)]
    for label, run in runs.items():
        for name, values in measure(run, collection.qrels, measures).per_query.items():
            head.append(f"{label}: {name}")
            for query, row in rows.items():
                row.append(round(values[query], 6))
    write_whole(as_csv([head, *rows.values()]), path)


def as_csv(rows: Iterable[Sequence[Cell]]) -> str:
    """Return CSV text: line breaks within quotes, and no text that a spreadsheet takes for a formula."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows([[_cell(value) for value in row] for row in rows])
    return out.getvalue()


def _cell(value: Cell) -> Cell:
    if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA):
        return "'" + value
    return value
