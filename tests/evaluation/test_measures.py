"""Measures are ir-measures' and trec_eval's, of the order that was returned."""

from __future__ import annotations

import math

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.measures import DEFAULT_MEASURES, measure


def slow_ndcg(order, grades, k):
    """Linear gain, as trec_eval's ndcg_cut, written out."""
    gain = sum(grades.get(doc, 0) / math.log2(place + 2) for place, doc in enumerate(order[:k]))
    ideal = sum(g / math.log2(place + 2) for place, g in enumerate(sorted(grades.values(), reverse=True)[:k]))
    return gain / ideal if ideal else 0.0


@settings(max_examples=60)
@given(
    order=st.permutations([f"d{i}" for i in range(8)]),
    grades=st.dictionaries(st.sampled_from([f"d{i}" for i in range(12)]), st.integers(0, 3), min_size=1),
    k=st.integers(1, 10),
)
def test_measures_agree_with_their_formulas(order, grades, k):
    relevant = {doc for doc, grade in grades.items() if grade > 0}
    measured = measure(
        {"q": [(doc, 0.0) for doc in order]},
        {"q": grades},
        [f"nDCG@{k}", f"R@{k}", f"P@{k}", "RR", f"RR@{k}", "AP", f"Success@{k}", f"Judged@{k}"],
    ).means

    hits = [doc in relevant for doc in order]
    assert measured[f"nDCG@{k}"] == pytest.approx(slow_ndcg(order, grades, k))
    assert measured[f"P@{k}"] == pytest.approx(sum(hits[:k]) / k)
    assert measured[f"R@{k}"] == pytest.approx(sum(hits[:k]) / len(relevant) if relevant else 0.0)
    first = hits.index(True) + 1 if any(hits) else math.inf
    assert measured["RR"] == pytest.approx(1 / first)
    assert measured[f"RR@{k}"] == pytest.approx(1 / first if first <= k else 0.0)
    precisions = [sum(hits[:place]) / place for place, hit in enumerate(hits, start=1) if hit]
    assert measured["AP"] == pytest.approx(sum(precisions) / len(relevant) if relevant else 0.0)
    assert measured[f"Success@{k}"] == (first <= k)
    assert measured[f"Judged@{k}"] == pytest.approx(sum(doc in grades for doc in order[:k]) / min(k, len(order)))


@settings(max_examples=40)
@given(
    run=st.dictionaries(
        st.sampled_from(["q1", "q2", "q3", "q4"]),
        st.lists(st.sampled_from([f"d{i}" for i in range(9)]), unique=True, max_size=9),
    ),
    qrels=st.dictionaries(
        st.sampled_from(["q1", "q2", "q3"]),
        st.dictionaries(st.sampled_from([f"d{i}" for i in range(12)]), st.integers(0, 3), min_size=1),
        min_size=1,
    ),
)
def test_runs_without_ties_are_measured_as_ir_measures_does(run, qrels):
    scored = {query: {doc: 1.0 - place / 10 for place, doc in enumerate(docs)} for query, docs in run.items()}
    names = [name for name in DEFAULT_MEASURES if not name.startswith("Judged")]
    theirs = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in names], qrels, scored)

    ours = measure({query: list(docs.items()) for query, docs in scored.items()}, qrels, names).means

    assert ours == pytest.approx({str(name): value for name, value in theirs.items()})


def test_equal_scores_are_measured_in_the_returned_order():
    run = {"q": [("b", 1.0), ("a", 1.0)]}

    assert measure(run, {"q": {"a": 1}}, ["RR", "RR@10"]).means == {"RR": 0.5, "RR@10": 0.5}
    assert measure(run, {"q": {"b": 1}}, ["RR", "RR@10"]).means == {"RR": 1.0, "RR@10": 1.0}


def test_a_query_that_the_run_misses_counts_as_zero_and_is_said():
    measured = measure({"q1": [("a", 1.0)], "other": [("a", 1.0)]}, {"q1": {"a": 1}, "q2": {"a": 1}}, ["RR"])

    assert measured.means == {"RR": 0.5}
    assert (measured.n_missing, measured.n_unjudged) == (1, 1)


def test_two_names_of_one_measure_have_the_same_values():
    measured = measure({"q": [("b", 1.0), ("a", 0.5)]}, {"q": {"a": 1}}, ["MRR@10", "RR@10", "MAP", "AP"])

    assert measured.means == dict.fromkeys(["MRR@10", "RR@10", "MAP", "AP"], 0.5)


@pytest.mark.parametrize(
    "name", ["nonsense@10", "", "nDCG@", "__import__('os')", "nDCG@0", "R@1.5", "P", "nDCG(foo=1)@10", "Judged@0"]
)
def test_an_unknown_measure_is_refused(name):
    with pytest.raises(InvalidInputError, match="is no measure"):
        measure({"q": [("a", 1.0)]}, {"q": {"a": 1}}, [name])


def test_a_document_twice_is_refused():
    with pytest.raises(InvalidInputError, match="twice"):
        measure({"q": [("a", 1.0), ("a", 0.5)]}, {"q": {"a": 1}})
