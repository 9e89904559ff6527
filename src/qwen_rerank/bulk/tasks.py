"""The three kinds of work: documents to vectors, pairs to log-odds, queries with candidates to ranked documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import pyarrow as pa

from qwen_rerank.bulk.work import BulkTask, Reject
from qwen_rerank.calibration import sigmoid
from qwen_rerank.checks import check_list, check_query, check_text, is_finite, kind_of
from qwen_rerank.documents.reader import Row, text_of
from qwen_rerank.documents.texts import document_of
from qwen_rerank.embedders import load_embedder
from qwen_rerank.errors import (
    BackendUnavailableError,
    DeviceOutOfMemoryError,
    InvalidInputError,
    NonFiniteScoreError,
    RateLimitedError,
    RerankServerError,
    RerankTimeoutError,
    ScorerClosedError,
)
from qwen_rerank.protocols import Embedder, Scorer, SimpleScorer
from qwen_rerank.reranker import LongDocuments, Reranker
from qwen_rerank.scorers.adapted import as_scorer
from qwen_rerank.scorers.base import BaseScorer
from qwen_rerank.types import Candidate, Document, RankedDocument, Scores

T = TypeVar("T")
Q = TypeVar("Q")

# Faults of a moment, not of a document: the job stops and goes on later, and no row is refused for them.
_PASSING = (RerankTimeoutError, BackendUnavailableError, RateLimitedError, ScorerClosedError, MemoryError)
# What PyTorch says where a process cannot use its device any more, whatever the class; with what a server refuses all of
# a caller's requests, as after a key was withdrawn; and what is raised where device, weights or server fail, or only one
# document: a harmless text tells which.
_LOST_DEVICE = ("CUDA error", "HIP error")
_REFUSES_ALL = frozenset({401, 402, 403, 404, 405, 407})
_OF_A_MODEL = (DeviceOutOfMemoryError, RuntimeError, NonFiniteScoreError, RerankServerError)
_HARMLESS = "text"


class EmbedTask(BulkTask[Embedder]):
    """Documents to vectors."""

    kind: ClassVar[str] = "embed"
    columns: ClassVar[tuple[tuple[str, pa.DataType], ...]] = (
        ("id", pa.string()),
        ("text", pa.string()),
        ("metadata", pa.string()),
        ("vector", pa.list_(pa.float32())),
    )

    def open(self) -> Embedder:
        """Return the embedder."""
        engine = load_embedder(self.model) if isinstance(self.model, str) else self.model()
        if not isinstance(engine, Embedder):
            raise InvalidInputError(
                f"embedder must be a name or a function that returns an Embedder, not {kind_of(engine)}."
            )
        _probe(engine)
        return engine

    def fingerprint(self, engine: Embedder) -> str:
        """Return the embedder's own."""
        return engine.fingerprint

    def make(self, engine: Embedder, path: str, rows: Sequence[tuple[int, Row]], rejects: list[Reject]) -> pa.Table:
        """Return id, text, metadata as JSON, and vector of each document."""
        read: list[tuple[int, Document, str]] = []
        for number, row in rows:
            try:
                document = document_of(row)
                check_text("id", document.id)
                read.append((number, document, check_text("metadata", _json(document.metadata))))
            except InvalidInputError as exc:
                rejects.append(Reject.because(exc, number, doc_id=row.get("id", row.get("_id"))))
        vectors, errors = _vectors_and_errors(engine, [document.text for _, document, _ in read])
        rejects += [Reject.because(error, read[i][0], doc_id=read[i][1].id) for i, error in errors.items()]
        kept = [place for place in range(len(read)) if place not in errors]
        columns = {
            "id": [read[place][1].id for place in kept],
            "text": [read[place][1].text for place in kept],
            "metadata": [read[place][2] for place in kept],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors[kept].ravel(), pa.float32()), engine.dim),
        }
        return self.table(columns, vector=pa.list_(pa.float32(), engine.dim))


@dataclass(frozen=True, kw_only=True)
class PairsTask(BulkTask[BaseScorer]):
    """Pairs of a query and a document to log-odds.

    Attributes:
        instruction: What relevance means; None for the scorer's own.
    """

    instruction: str | None = None

    kind: ClassVar[str] = "pairs"
    columns: ClassVar[tuple[tuple[str, pa.DataType], ...]] = (
        ("file", pa.string()),
        ("row", pa.int64()),
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("log_odds", pa.float32()),
        ("score", pa.float64()),
        ("tokens", pa.int32()),
        ("kept_chars", pa.int32()),
    )

    def settings(self) -> dict[str, Any]:
        """Return those of every kind, and the instruction."""
        return {**super().settings(), "instruction": self.instruction}

    def open(self) -> BaseScorer:
        """Return the scorer."""
        scorer = as_scorer(_given_scorer(self.model))
        _raise_of_model(self._probe(scorer))
        return scorer

    def fingerprint(self, engine: BaseScorer) -> str:
        """Return the scorer's own."""
        return engine.fingerprint

    def make(self, engine: BaseScorer, path: str, rows: Sequence[tuple[int, Row]], rejects: list[Reject]) -> pa.Table:
        """Return what the scorer says of each pair."""
        read: list[tuple[int, str | None, str | None, str, str]] = []
        for number, row in rows:
            try:
                ids = _id(row, "query_id"), _id(row, "doc_id")
                read.append((number, *ids, check_query(row.get("query")), text_of(row, "document")))
            except InvalidInputError as exc:
                rejects.append(Reject.because(exc, number, row.get("query_id"), row.get("doc_id")))
        found = self._scores(engine, [one[3] for one in read], [[one[4]] for one in read])
        made: list[tuple[Any, ...]] = []
        for (number, query_id, doc_id, _, _), scores in zip(read, found, strict=True):
            error = scores if isinstance(scores, InvalidInputError) else scores.errors.get(0)
            if isinstance(scores, InvalidInputError) or error is not None:
                rejects.append(Reject.because(cast("Exception", error), number, query_id, doc_id))
                continue
            score = float(sigmoid(scores.log_odds)[0])
            counts = int(scores.tokens[0]), int(scores.kept_chars[0])
            made.append((path, number, query_id, doc_id, scores.log_odds[0], score, *counts))
        return self.table({name: [one[place] for one in made] for place, (name, _) in enumerate(self.columns)})

    def _scores(
        self, engine: BaseScorer, queries: list[str], texts: list[list[str]]
    ) -> Sequence[Scores | InvalidInputError]:
        def score(queries: Sequence[str], texts: Sequence[list[str]]) -> list[Scores]:
            found = engine.score_details_many(queries, texts, instruction=self.instruction)
            _raise_if_broken([error for scores in found for error in scores.errors.values()], self._probe, engine)
            return found

        return _all_or_each(score, queries, texts)

    def _probe(self, engine: BaseScorer) -> Iterable[Exception]:
        return engine.score_details("query", [_HARMLESS], instruction=self.instruction).errors.values()


@dataclass(frozen=True, kw_only=True)
class RunsTask(BulkTask[Reranker]):
    """Queries with their candidates to ranked documents.

    Attributes:
        instruction: What relevance means; None for the reranker's own.
        top_n: Longest result of a query; None for the reranker's own, else all candidates.
        long_documents: As in `Reranker`, for a model that is no reranker yet.
    """

    instruction: str | None = None
    top_n: int | None = None
    long_documents: LongDocuments = "truncate"

    kind: ClassVar[str] = "runs"
    columns: ClassVar[tuple[tuple[str, pa.DataType], ...]] = (
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float64()),
        ("log_odds", pa.float32()),
        ("first_stage_score", pa.float64()),
        ("truncated", pa.bool_()),
    )

    def settings(self) -> dict[str, Any]:
        """Return those of every kind, and what changes a result."""
        own = {"instruction": self.instruction, "top_n": self.top_n, "long_documents": self.long_documents}
        return {**super().settings(), **own}

    def open(self) -> Reranker:
        """Return the reranker, which puts failed documents last."""
        given = _given_scorer(self.model)
        if isinstance(given, Reranker):
            reranker = replace(given, on_error="last", top_n=self.top_n or given.top_n)
        else:
            reranker = Reranker(given, on_error="last", top_n=self.top_n, long_documents=self.long_documents)
        _raise_of_model(self._probe(reranker))
        return reranker

    def fingerprint(self, engine: Reranker) -> str:
        """Return a digest of all that a reranker's results depend on."""
        parts = [sorted(engine.calibration_key().items()), engine.threshold, engine.top_n, repr(engine.calibration)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]

    def make(self, engine: Reranker, path: str, rows: Sequence[tuple[int, Row]], rejects: list[Reject]) -> pa.Table:
        """Return the ranked documents of each query, best first."""
        read: list[tuple[int, str, str, list[Candidate]]] = []
        for number, row in rows:
            try:
                query_id = _id(row, "query_id") or text_of(row, "query_id")
                query = check_query(row.get("query"))
                read.append((number, query_id, query, _candidates(row, number, query_id, rejects)))
            except InvalidInputError as exc:
                rejects.append(Reject.because(exc, number, row.get("query_id")))
        found = self._ranked(engine, [one[2] for one in read], [one[3] for one in read])
        made: list[tuple[Any, ...]] = []
        for (number, query_id, _, _), hits in zip(read, found, strict=True):
            if isinstance(hits, InvalidInputError):
                rejects.append(Reject.because(hits, number, query_id))
                continue
            for hit in hits:
                doc = hit.document.id
                if hit.error is not None:
                    rejects.append(Reject.because(hit.error, number, query_id, doc))
                elif engine.top_n is None or hit.rank <= engine.top_n:
                    scores = hit.score, hit.log_odds, hit.first_stage_score
                    made.append((query_id, doc, hit.rank, *scores, hit.truncated))
        return self.table({name: [one[place] for one in made] for place, (name, _) in enumerate(self.columns)})

    def _ranked(
        self, engine: Reranker, queries: list[str], candidates: list[list[Candidate]]
    ) -> Sequence[list[RankedDocument] | InvalidInputError]:
        def rank(queries: Sequence[str], candidates: Sequence[list[Candidate]]) -> list[list[RankedDocument]]:
            # All of them: failed ones are last, beyond any top_n, and must be told.
            most = max(1, *map(len, candidates))
            found = engine.rerank_many(queries, candidates, instruction=self.instruction, top_n=most)
            errors = [hit.error for hits in found for hit in hits if hit.error is not None]
            _raise_if_broken(errors, self._probe, engine)
            return found

        return _all_or_each(rank, queries, candidates)

    def _probe(self, engine: Reranker) -> Iterable[Exception]:
        hits = engine.rerank("query", [_HARMLESS], instruction=self.instruction)
        return [hit.error for hit in hits if hit.error is not None]


# Of the part files; a vector's length is the model's.
SCHEMAS = {
    task.kind: pa.schema([pa.field(*column) for column in task.columns]) for task in (EmbedTask, PairsTask, RunsTask)
}


def _given_scorer(model: Callable[[], object] | str) -> Scorer | SimpleScorer | Reranker | str:
    """Return what a name or a loading function gives, if it can score."""
    given = model if isinstance(model, str) else model()
    if not isinstance(given, str | Reranker | SimpleScorer):
        raise InvalidInputError(f"scorer must be a name or a function that returns a scorer, not {kind_of(given)}.")
    return given


def _id(row: Row, name: str) -> str | None:
    value = row.get(name)
    return None if value is None else check_text(name, value if isinstance(value, str) else str(value))


def _json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False, default=str)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"metadata cannot be written as JSON ({exc}).") from exc


def _candidates(row: Row, number: int, query_id: str, rejects: list[Reject]) -> list[Candidate]:
    """Return the candidates of a row; one that is none is added to `rejects`, and the others stay."""
    found: list[Candidate] = []
    for rank, given in enumerate(check_list("candidates", row.get("candidates"), of="objects with id and text"), 1):
        try:
            if not isinstance(given, dict):
                raise InvalidInputError(
                    f"candidates[{rank - 1}] must be an object with id and text, not {kind_of(given)}."
                )
            values = {name: value for name, value in given.items() if value is not None}
            score = values.pop("score", None)
            if score is not None and not is_finite(score):
                told = repr(score)[:40]
                raise InvalidInputError(f"candidates[{rank - 1}] has the score {told}; give a finite number or none.")
            document = document_of(values)
            check_text("id", document.id)
            found.append(Candidate(document, None if score is None else float(score), rank))
        except InvalidInputError as exc:
            doc_id = given.get("id") if isinstance(given, dict) else None
            rejects.append(Reject.because(exc, number, query_id, doc_id))
    return found


def _all_or_each(
    call: Callable[[Sequence[str], Sequence[Q]], list[T]], queries: list[str], others: list[Q]
) -> Sequence[T | InvalidInputError]:
    """Return the results of all queries in one call; where that refuses one of them, each query's own result or error."""
    try:
        return call(queries, others) if queries else []
    except InvalidInputError:
        pass
    found: list[T | InvalidInputError] = []
    for query, other in zip(queries, others, strict=True):
        try:
            found += call([query], [other])
        except InvalidInputError as exc:
            found.append(exc)
    return found


def _raise_passing(errors: Iterable[Exception]) -> None:
    for error in errors:
        if any(isinstance(cause, _PASSING) or _tells_of_all(cause) for cause in _causes(error)):
            raise error


def _raise_of_model(errors: Iterable[Exception]) -> None:
    """Raise what a harmless text met, if a model or server is at fault and not the text."""
    for error in errors:
        _raise_passing([error])
        if any(isinstance(cause, _OF_A_MODEL) for cause in _causes(error)):
            raise error


def _raise_if_broken(errors: Sequence[Exception], probe: Callable[[Q], Iterable[Exception]], engine: Q) -> None:
    """Raise where errors of documents are the model's own: of the moment, of the device, or a harmless text fails alike."""
    _raise_passing(errors)
    if any(isinstance(cause, _OF_A_MODEL) for error in errors for cause in _causes(error)):
        _raise_of_model(probe(engine))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _tells_of_all(error: BaseException) -> bool:
    if isinstance(error, RerankServerError):
        return error.status in _REFUSES_ALL
    # A refused row may be quoted in its error, and say anything.
    return not isinstance(error, InvalidInputError) and any(words in str(error) for words in _LOST_DEVICE)


def _vectors(engine: Embedder, texts: list[str]) -> np.ndarray:
    found = np.asarray(engine.embed_documents(texts), dtype=np.float32)
    if found.shape != (len(texts), engine.dim):
        raise InvalidInputError(
            f"the embedder returned shape {found.shape} for {len(texts)} texts; expected ({len(texts)}, {engine.dim})."
        )
    return found


def _probe(engine: Embedder) -> None:
    """Embed a harmless text, and raise what the embedder raises: one that is broken must refuse no row."""
    if not np.isfinite(_vectors(engine, [_HARMLESS])).all():
        raise NonFiniteScoreError(f"the embedder gave NaN or infinity for {_HARMLESS!r}; no row is refused for that.")


def _vectors_and_errors(engine: Embedder, texts: list[str]) -> tuple[np.ndarray, dict[int, Exception]]:
    """Return a vector a text, and why some have none; a text that makes the embedder fail touches no other.

    Raises:
        Exception: What an embedder raises that fails at any text by now, as on a GPU whose context is lost.
    """
    errors: dict[int, Exception] = {}
    found = np.zeros((len(texts), engine.dim), dtype=np.float32)
    try:
        if texts:
            found = _vectors(engine, texts)
    except Exception as raised:  # an embedder raises anything for a text; which text it was, each by itself tells
        _raise_passing([raised])
        for place, text in enumerate(texts):
            try:
                found[place] = _vectors(engine, [text])[0]
            except Exception as exc:
                _raise_passing([exc])
                errors[place] = exc
    for place in np.flatnonzero(~np.isfinite(found).all(axis=1)).tolist():
        errors[place] = NonFiniteScoreError("the embedder gave NaN or infinity.")
    if errors:
        _probe(engine)
    return found, errors
