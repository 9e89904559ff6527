"""The sweep measures every combination once, and its recommendation follows from what it measured."""

from __future__ import annotations

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.sweep import Outcome, pareto, recommend, sweep
from qwen_rerank.reranker import Reranker
from qwen_rerank.testing import OverlapScorer


def outcome(name, values, p95_ms, cost=None):
    per_query = {f"q{i}": v for i, v in enumerate(values)}
    return Outcome(name, None, 0, {"nDCG@10": sum(values) / len(values)}, per_query, p95_ms, p95_ms, cost)


GOOD = outcome("good", [0.9, 0.8, 0.9, 0.85] * 5, 300.0, 3.0)
SAME = outcome("same", [0.897, 0.802, 0.896, 0.85] * 5, 100.0, 1.0)
UNCLEAR = outcome("unclear", [0.87, 0.82, 0.89, 0.86] * 5, 50.0, 0.5)
WORSE = outcome("worse", [0.5, 0.4, 0.5, 0.45] * 5, 10.0, 0.1)
WASTE = outcome("waste", [0.5, 0.4, 0.5, 0.45] * 5, 500.0, 5.0)
ALL = [GOOD, SAME, WORSE, WASTE]


def test_every_first_stage_stands_alone_and_with_every_reranker_at_every_depth(collection, first_stage):
    rerankers = {"overlap": Reranker(OverlapScorer())}

    outcomes = sweep(collection, {"fixed": first_stage}, rerankers, depths=(2, 8), n_timed=2, price_per_hour=3.6)

    assert [o.label for o in outcomes] == ["fixed", "fixed → overlap @2", "fixed → overlap @8"]
    assert [o.means["RR@10"] for o in outcomes] == sorted(o.means["RR@10"] for o in outcomes)
    assert all(o.p95_ms >= o.p50_ms > 0 and o.cost > 0 for o in outcomes)


def test_the_front_holds_what_nothing_beats_at_no_higher_price():
    front = pareto(ALL, primary="nDCG@10", price=lambda o: o.p95_ms)

    assert [o.label for o in front] == ["worse", "same", "good"]


def test_the_fastest_that_is_shown_to_lose_next_to_nothing_is_recommended():
    recommendation = recommend(ALL)

    assert recommendation.outcome is SAME
    assert (
        "good (nDCG@10 0.863, 300 ms at p95, 3.0000 for 1,000 searches) is better by no more than 0.01 (95 % sure, 4 settings compared)"
        in recommendation.sentence
    )


def test_a_setting_that_few_queries_cannot_tell_from_the_best_is_named_and_not_taken():
    recommendation = recommend([GOOD, UNCLEAR])

    assert recommendation.outcome is GOOD
    assert "these 20 queries are too few to tell unclear" in recommendation.sentence


def test_the_more_settings_are_tried_the_more_it_takes_to_be_recommended():
    """A setting that one comparison lets pass, by a hair, does not pass as one of twenty."""
    hair = outcome("hair", [0.875, 0.82, 0.89, 0.86] * 5, 100.0)
    others = [outcome(f"other {i}", WORSE.per_query.values(), 400.0) for i in range(18)]

    assert recommend([GOOD, hair]).outcome is hair
    assert recommend([GOOD, hair, *others]).outcome is GOOD


@pytest.mark.parametrize(("budget", "label"), [({"max_p95_ms": 50}, "worse"), ({"max_cost": 2.0}, "same")])
def test_a_budget_is_kept(budget, label):
    assert recommend(ALL, **budget).outcome.label == label


def test_a_budget_that_nothing_keeps_names_the_fastest():
    with pytest.raises(InvalidInputError, match="the fastest, worse, takes 10 ms"):
        recommend(ALL, max_p95_ms=1)


def test_a_cost_budget_without_prices_is_refused():
    with pytest.raises(InvalidInputError, match="price_per_hour"):
        recommend([outcome("x", [1.0, 1.0], 1.0)], max_cost=1.0)
