"""Measures of a run: ir-measures over strictly ordered surrogate scores, overall and for each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qwen_rerank.documents import Qrels, Run
from qwen_rerank.errors import InvalidInputError, MissingExtraError

try:
    import ir_measures
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.evaluation", package="ir-measures", extra="eval", cause=exc) from exc

DEFAULT_MEASURES = ("nDCG@10", "R@100", "RR@10", "AP", "P@10", "Success@10", "Judged@10")


@dataclass(frozen=True, slots=True)
class Measured:
    """The measures of one run, for each query and overall.

    Attributes:
        per_query: Measure to query id to value in [0, 1]; every query of the qrels is there, 0 where the run has none.
        n_missing: Queries of the qrels that the run does not answer; they count as 0.
        n_unjudged: Queries of the run without judgements; they count nowhere.
    """

    per_query: Mapping[str, Mapping[str, float]]
    n_missing: int
    n_unjudged: int

    @property
    def means(self) -> dict[str, float]:
        """Measure to its mean over all queries of the qrels."""
        return {name: float(np.mean(list(values.values()))) for name, values in self.per_query.items()}


def measure(run: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES) -> Measured:
    """Measure a run.

    The run's order is what is measured: ties in its scores are not broken anew. nDCG has the linear gain of
    trec_eval's `ndcg_cut`. Judged@k is the share of the first k documents that anybody judged: where it is low, a low
    measure may be the judges' and not the run's.

    Args:
        run: Query id to (document id, score), best first.
        qrels: Query id to document id to grade.
        measures: Names as ir-measures writes them, e.g. "nDCG@10", "R@100", "RR@10", "AP", "P@5", "Success@1".

    Raises:
        InvalidInputError: If a measure is unknown or a query lists a document twice.
    """
    parsed = {name: _parse(name) for name in measures}
    ordered = _surrogates(run, qrels)
    # "MRR@10" and "RR@10" are one measure under two names.
    found: dict[str, dict[str, float]] = {str(value): dict.fromkeys(qrels, 0.0) for value in parsed.values()}
    for metric in ir_measures.iter_calc(
        list({str(value): value for value in parsed.values()}.values()), qrels, ordered
    ):
        found[str(metric.measure)][metric.query_id] = float(metric.value)
    per_query = {name: dict(found[str(value)]) for name, value in parsed.items()}
    n_missing = sum(not run.get(query) for query in qrels)
    return Measured(per_query, n_missing=n_missing, n_unjudged=sum(query not in qrels for query in run))


def check_measures(names: Sequence[str]) -> int:
    """Return the deepest cut-off of measures, 0 where none has one: so many documents a first stage must give.

    Raises:
        InvalidInputError: If one of them is unknown.
    """
    return max((int(_parse(name).params.get("cutoff") or 0) for name in names), default=0)


@lru_cache(maxsize=256)
def _parse(name: str) -> ir_measures.Measure:
    """Return a measure that was tried, so that one which cannot be computed is refused before any work."""
    try:
        parsed = ir_measures.parse_measure(name)
        cutoff = parsed.params.get("cutoff", 1)
        if not isinstance(cutoff, int) or cutoff < 1:  # trec_eval ends the process at 0
            raise ValueError("its cut-off must be an integer of at least 1")
        list(ir_measures.iter_calc([parsed], {"q": {"d": 1}}, {"q": {"d": 1.0}}))
    except Exception as exc:  # each provider has errors of its own for what it does not know
        raise InvalidInputError(
            f"{name!r} is no measure that can be computed; there are for example {', '.join(DEFAULT_MEASURES)}."
        ) from exc
    return parsed


def _surrogates(run: Run, qrels: Qrels) -> dict[str, dict[str, float]]:
    """Return the judged queries' hits with scores n, n - 1, …: measures break equal scores in ways of their own."""
    ordered = {}
    for query, hits in run.items():
        if query in qrels and hits:
            ordered[query] = {document: float(len(hits) - place) for place, (document, _) in enumerate(hits)}
            if len(ordered[query]) < len(hits):
                raise InvalidInputError(f"the run lists a document twice for query {query!r}.")
    return ordered
