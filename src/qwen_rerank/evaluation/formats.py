"""The cost of a number format: a model's scores in it beside the exact ones, each from a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError, ScorerError
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.evaluation.experiment import RunScores, recall, rerank_run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.significance import Comparison, compare
from qwen_rerank.lexical import BM25Index
from qwen_rerank.samples import load_encyclopedia

_MEASURE = "nDCG@10"
_TOP = 10
_QUERIES_A_CALL = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """The number format that a model computes in.

    Attributes:
        dtype: "auto", "bfloat16", "float16" or "float32".
        quantize: "int8", or None.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    quantize: Literal["int8"] | None = None


@dataclass(frozen=True, slots=True)
class FormatRun:
    """A model's scores in one format.

    Attributes:
        name: The format as it was taken, e.g. "bfloat16" or "int8 over bfloat16, 6 % exact".
        log_odds: One float32 array a query.
        seconds: What scoring took, loading and one call to warm up aside.
        peak_bytes: The most memory that the process took, libraries included; None where the system does not tell.
    """

    name: str
    log_odds: list[np.ndarray]
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class FormatCost:
    """A format beside the exact one, on the same documents.

    Attributes:
        model: The model's name.
        collection: Where queries and documents come from.
        n_queries: Queries.
        n_documents: Documents scored, all queries together.
        names: The exact format and the other.
        largest: Largest difference of a document's log-odds.
        typical: Median difference.
        tau: Mean over the queries of Kendall's tau-b between the two orders; 1 is the same order; None where no query
            has two documents with unlike scores.
        top_overlap: Mean share of the first ten that both have.
        ndcg: Mean nDCG@10 in each format.
        change: nDCG@10 of the other format against the exact one, query by query.
        documents_per_s: In each format, one after the other on this machine.
        peak_bytes: Of each format's process.
    """

    model: str
    collection: str
    n_queries: int
    n_documents: int
    names: tuple[str, str]
    largest: float
    typical: float
    tau: float | None
    top_overlap: float
    ndcg: tuple[float, float]
    change: Comparison
    documents_per_s: tuple[float, float]
    peak_bytes: tuple[int | None, int | None]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return asdict(self)


def sample_collection(language: str = "en") -> Collection:
    """Return the judged sentences that ship with the package as a collection."""
    sample = load_encyclopedia(language)
    queries = {str(number): text for number, text in enumerate(sample.queries) if text in sample.relevant}
    qrels = {query: {sample.relevant[text]: 1} for query, text in queries.items()}
    return Collection(f"shipped encyclopedia ({language})", "test", sample.documents, queries, qrels)


def format_cost(
    model: str, other: Format, collection: Collection, *, exact: Format | None = None, depth: int = 50
) -> FormatCost:
    """Return what `other` costs beside `exact` on the first `depth` documents that BM25 finds for each query.

    Args:
        model: Hub name or folder of a Qwen3-Reranker, or "pocket".
        other: The format in question.
        collection: Queries, documents and judgements.
        exact: What it is compared with; None is float32.
        depth: Documents of each query.

    Raises:
        InvalidInputError: If both formats are the same, or one cannot be had here.
        ModelError: If the model cannot be used.
    """
    exact = exact or Format()
    if exact == other:
        raise InvalidInputError(f"the format to compare is the exact one itself, {exact.dtype}; name another.")
    run = recall(BM25Index(collection.documents), collection, top_k=check_count("depth", depth)).run
    texts = {document.id: document.text for document in collection.documents}
    run = {query: hits for query, hits in run.items() if hits}
    queries = [collection.queries[query] for query in run]
    documents = [[texts[doc] for doc, _ in hits] for hits in run.values()]
    one, two = (_in_own_process(model, each, queries, documents) for each in (exact, other))

    differences = np.abs(np.concatenate(one.log_odds) - np.concatenate(two.log_odds))
    pairs = list(zip(one.log_odds, two.log_odds, strict=True))
    taus = [float(stats.kendalltau(a, b).statistic) for a, b in pairs if len(a) > 1]
    taus = [tau for tau in taus if not np.isnan(tau)]  # as where all scores are equal
    measured = [
        measure(rerank_run(run, _run_scores(run, each), depth=depth), collection.qrels, [_MEASURE])
        for each in (one, two)
    ]
    first, second = (each.per_query[_MEASURE] for each in measured)
    n_documents = len(differences)
    return FormatCost(
        model=model,
        collection=collection.name,
        n_queries=len(queries),
        n_documents=n_documents,
        names=(one.name, two.name),
        largest=float(differences.max()),
        typical=float(np.median(differences)),
        tau=float(np.mean(taus)) if taus else None,
        top_overlap=float(np.mean([top_overlap(a, b) for a, b in pairs])),
        ndcg=(measured[0].means[_MEASURE], measured[1].means[_MEASURE]),
        change=compare(first, {"format": second})["format"],
        documents_per_s=(n_documents / one.seconds, n_documents / two.seconds),
        peak_bytes=(one.peak_bytes, two.peak_bytes),
    )


def top_overlap(one: np.ndarray, other: np.ndarray, *, n: int = _TOP) -> float:
    """Return the share of the first `n` documents by one's scores that are among the other's first `n` too."""
    first, second = (set(np.argsort(-scores, kind="stable")[:n].tolist()) for scores in (one, other))
    return len(first & second) / len(first)


def score_in_format(
    model: str, chosen: Format, queries: Sequence[str], documents: Sequence[Sequence[str]]
) -> FormatRun:
    """Return the scores of a model in a format, computed in this process."""
    from qwen_rerank.scorers.qwen import QwenScorer

    with QwenScorer(
        model, device="cpu" if chosen.quantize else "auto", dtype=chosen.dtype, quantize=chosen.quantize
    ) as scorer:
        scorer.score(queries[0], documents[0])
        started = time.perf_counter()
        log_odds: list[np.ndarray] = []
        for start in range(0, len(queries), _QUERIES_A_CALL):
            part = slice(start, start + _QUERIES_A_CALL)
            log_odds += scorer.score_many(queries[part], documents[part])
        seconds = time.perf_counter() - started
        name = scorer.dtype
        if scorer.quantization is not None:
            name = f"int8 over {name}, {100 * scorer.quantization.exact_share:.0f} % exact"
        return FormatRun(name, log_odds, seconds, _peak_bytes())


def _in_own_process(
    model: str, chosen: Format, queries: Sequence[str], documents: Sequence[Sequence[str]]
) -> FormatRun:
    """Score in a process of its own, so that one format's memory is not another's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(score_in_format, model, chosen, queries, documents).result()
        except BrokenProcessPool as exc:
            raise ScorerError(f"the process that scored in {chosen.dtype} died; was there memory for it?") from exc


def _peak_bytes() -> int | None:
    """Return the most memory that this process took; `getrusage` would count the parent's before the start as well."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _run_scores(run: dict[str, list[tuple[str, float]]], scored: FormatRun) -> RunScores:
    return {
        query: {doc: float(value) for (doc, _), value in zip(hits, values, strict=True)}
        for (query, hits), values in zip(run.items(), scored.log_odds, strict=True)
    }
