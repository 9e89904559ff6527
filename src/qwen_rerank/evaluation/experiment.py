"""Both stages over a collection: one first-stage pass and one scoring pass give the runs of every depth."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from tqdm import tqdm

from qwen_rerank.checks import check_count
from qwen_rerank.documents import Run
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.cache import KeptScore, ScoreCache, document_key
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.pipeline import TwoStageRetriever, rank_fusion
from qwen_rerank.protocols import FirstStage
from qwen_rerank.reranker import Reranker
from qwen_rerank.types import Candidate, Document

log = logging.getLogger(__name__)

RunScores = dict[str, dict[str, float]]
"""Query id to document id to log-odds."""

# One call: enough for full packs, little enough that progress shows and little is lost when the work breaks off.
_DOCUMENTS_A_CALL = 256
_CHARS_A_CALL = 400_000
_REPORT_S = 30.0  # between lines of progress where there is no terminal


@dataclass(frozen=True, slots=True)
class Recall:
    """The run of a first stage, with the time of each search.

    Attributes:
        run: Query id to (document id, first-stage score), best first.
        seconds: Query id to the time that its search took.
    """

    run: Run
    seconds: Mapping[str, float]


def recall(first_stage: FirstStage, collection: Collection, *, top_k: int, name: str = "first stage") -> Recall:
    """Search every query of the collection, one at a time, as a user would wait for it.

    One search goes before them unmeasured, so that loading a model is not taken for searching.
    """
    check_count("top_k", top_k)
    run: Run = {}
    seconds: dict[str, float] = {}
    first_stage.search(next(iter(collection.queries.values())), top_k)
    for query, text in tqdm(collection.queries.items(), desc=name, unit="query", disable=None):
        started = time.perf_counter()
        found = first_stage.search(text, top_k)
        seconds[query] = time.perf_counter() - started
        run[query] = [(candidate.document.id, _first_score(candidate)) for candidate in found]
    return Recall(run, seconds)


def fuse(runs: Sequence[Run], collection: Collection, *, top_k: int) -> Run:
    """Return the reciprocal rank fusion of several first stages, at most `top_k` a query."""
    documents = {document.id: document for document in collection.documents}
    fused: Run = {}
    for query in collection.queries:
        lists = [_candidates(run.get(query, []), documents) for run in runs]
        fused[query] = [(found.document.id, _first_score(found)) for found in rank_fusion(lists)[:top_k]]
    return fused


def score_run(
    reranker: Reranker,
    collection: Collection,
    run: Run,
    *,
    depth: int,
    cache: ScoreCache | None = None,
    name: str = "rerank",
) -> RunScores:
    """Score the first `depth` candidates of every query once; what the cache knows is not scored again.

    Raises:
        DocumentScoringError: If a document cannot be scored; what was scored before it is in the cache.
        InvalidInputError: If the run names a document that the collection does not have.
    """
    check_count("depth", depth)
    plain = replace(reranker, top_n=None, threshold=None, calibration=None, on_error="raise")
    documents = {document.id: document for document in collection.documents}
    scores: RunScores = {}
    wanted: list[tuple[str, list[Candidate]]] = []
    for query in collection.queries:
        candidates = _candidates(run.get(query, [])[:depth], documents)
        scores[query], missing = _known(plain, collection.queries[query], candidates, cache)
        wanted.append((query, missing))
    with _Progress(name, total=sum(len(missing) for _, missing in wanted)) as progress:
        for part in _parts(wanted):
            _score_part(plain, collection, part, scores, cache)
            progress.add(sum(len(missing) for _, missing in part))
    return scores


class _Progress:
    """Documents scored so far: a bar on a terminal, else a line in the log now and then."""

    def __init__(self, name: str, *, total: int) -> None:
        self._name = name
        self._total = total
        self._done = 0
        self._started = self._said = time.monotonic()
        self._bar = tqdm(total=total, desc=name, unit="doc", disable=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, n_documents: int) -> None:
        """Count documents."""
        self._bar.update(n_documents)
        self._done += n_documents
        now = time.monotonic()
        if self._bar.disable and (
            now - self._said >= _REPORT_S or (self._said > self._started and self._done == self._total)
        ):
            self._said = now
            left_s = (now - self._started) / self._done * (self._total - self._done)
            log.info("%s: %d of %d documents scored, about %.0f s left", self._name, self._done, self._total, left_s)


def _parts(wanted: Sequence[tuple[str, list[Candidate]]]) -> Iterator[list[tuple[str, list[Candidate]]]]:
    """Return the candidates in calls of bounded size, in order; a query may be spread over several."""
    part: dict[str, list[Candidate]] = {}
    n_documents = n_chars = 0
    for query, candidates in wanted:
        for candidate in candidates:
            part.setdefault(query, []).append(candidate)
            n_documents, n_chars = n_documents + 1, n_chars + len(candidate.document.text)
            if n_documents >= _DOCUMENTS_A_CALL or n_chars >= _CHARS_A_CALL:
                yield list(part.items())
                part, n_documents, n_chars = {}, 0, 0
    if part:
        yield list(part.items())


def rerank_run(run: Run, scores: RunScores, *, depth: int) -> Run:
    """Return the run with its first `depth` documents in the order of their log-odds, the rest behind them as they were.

    Equal scores keep the first stage's order. The scores of the result are the log-odds, and minus infinity behind them.
    """
    check_count("depth", depth)
    reranked: Run = {}
    for query, hits in run.items():
        head, tail = hits[:depth], hits[depth:]
        known = scores.get(query, {})
        if missing := [document for document, _ in head if document not in known]:
            raise InvalidInputError(
                f"document {missing[0]!r} of query {query!r} was not scored; score the run to depth {depth}."
            )
        order = np.argsort([-known[document] for document, _ in head], kind="stable")
        reranked[query] = [(head[i][0], known[head[i][0]]) for i in order] + [(doc, float("-inf")) for doc, _ in tail]
    return reranked


def time_searches(retriever: TwoStageRetriever, collection: Collection, *, n_queries: int, name: str) -> np.ndarray:
    """Return the seconds that both stages took for each of the first `n_queries` queries, float64 `(n_queries,)`.

    Each query is one call, nothing is cached, and one call goes before them unmeasured, as a warm-up. Each is called twice and the
    faster time taken: what else the machine does is not the setting's, and would decide the percentiles of a few queries.
    """
    queries = list(collection.queries.values())[: check_count("n_queries", n_queries)]
    retriever.retrieve(queries[0])
    timed = tqdm(queries, desc=name, unit="query", disable=None)
    return np.array([min(_seconds(retriever, query) for _ in range(2)) for query in timed])


def _seconds(retriever: TwoStageRetriever, query: str) -> float:
    started = time.perf_counter()
    retriever.retrieve(query)
    return time.perf_counter() - started


def _first_score(candidate: Candidate) -> float:
    return -float(candidate.rank) if candidate.score is None else float(candidate.score)


def _candidates(hits: Sequence[tuple[str, float]], documents: Mapping[str, Document]) -> list[Candidate]:
    try:
        return [Candidate(documents[doc], score, rank) for rank, (doc, score) in enumerate(hits, start=1)]
    except KeyError as exc:
        raise InvalidInputError(
            f"the run names document {exc.args[0]!r}, which the collection does not have."
        ) from None


def _known(
    reranker: Reranker, query: str, candidates: list[Candidate], cache: ScoreCache | None
) -> tuple[dict[str, float], list[Candidate]]:
    """Return what the cache knows of the candidates, and those that it does not know."""
    if cache is None:
        return {}, candidates
    keys = {candidate.document.id: document_key(reranker, query, candidate.document.text) for candidate in candidates}
    found = cache.get(list(keys.values()))
    known = {doc: found[key].log_odds for doc, key in keys.items() if key in found}
    return known, [candidate for candidate in candidates if candidate.document.id not in known]


def _score_part(
    reranker: Reranker,
    collection: Collection,
    part: list[tuple[str, list[Candidate]]],
    scores: RunScores,
    cache: ScoreCache | None,
) -> None:
    texts = [collection.queries[query] for query, _ in part]
    results = reranker.rerank_many(texts, [candidates for _, candidates in part])
    fresh: dict[bytes, KeptScore] = {}
    for (query, _), text, hits in zip(part, texts, results, strict=True):
        for hit in hits:
            scores[query][hit.document.id] = hit.log_odds
            fresh[document_key(reranker, text, hit.document.text)] = KeptScore(hit.log_odds)
    if cache is not None:
        cache.put(fresh)
