"""The filter language: what holds, what is refused, and that every evaluator says the same."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.filters import matches, parse_filter

BOOK = {
    "lang": "zh",
    "year": 2021,
    "price": 9.5,
    "new": True,
    "gone": None,
    "tags": ["red", 7, None],
    "day": "2024-05-01",
    "at": "2024-05-01T12:00:00+08:00",
    "nested": {"a": 1},
    "none": [],
}


@pytest.mark.parametrize(
    "filter",
    [
        {},
        {"lang": "zh", "year": 2021.0},
        {"year": {"$gte": 2021, "$lt": 2022}},
        {"price": {"$gt": 9, "$lte": 9.5}},
        {"lang": {"$gt": "en"}},
        {"new": True},
        {"gone": None},
        {"lang": {"$in": ["en", "zh"]}},
        {"gone": {"$in": [1, None]}},
        {"lang": {"$nin": ["en"]}, "missing": {"$nin": ["en"]}},
        {"lang": {"$ne": "en"}, "missing": {"$ne": "en"}, "year": {"$ne": "2021"}},
        {"gone": {"$exists": True}, "missing": {"$exists": False}},
        {"tags": {"$contains": "red"}},
        {"$and": [{"tags": {"$contains": 7}}, {"tags": {"$contains": None}}]},
        {"$or": [{"lang": "en"}, {"year": {"$gt": 2000}}]},
        {"$not": {"lang": "en"}},
        {"year": {"$not": {"$lt": 2000}}},
        {"none": [], "tags": {"$ne": []}},
        {"day": date(2024, 5, 1)},
        {"day": {"$gte": date(2024, 5, 1), "$lt": datetime(2024, 5, 1, 0, 0, 1)}},
        {"at": datetime(2024, 5, 1, 4, tzinfo=UTC)},
        {"at": {"$lt": datetime(2024, 5, 1, 5, tzinfo=UTC)}},
        {"at": {"$in": [datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=8)))]}},
    ],
)
def test_what_holds(filter):
    assert matches(parse_filter(filter), BOOK)
    assert not matches(parse_filter({"$not": filter}), BOOK)


@pytest.mark.parametrize(
    "filter",
    [
        {"new": 1},
        {"year": True},
        {"year": "2021"},
        {"missing": None},
        {"tags": "red"},
        {"lang": {"$contains": "z"}},
        {"tags": {"$contains": True}},
        {"year": {"$gt": "2000"}},
        {"lang": {"$gt": 0}},
        {"lang": {"$in": []}},
        {"nested": {"$eq": "a"}},
        {"lang": {"$gte": date(2000, 1, 1)}},
    ],
)
def test_what_does_not_hold(filter):
    assert not matches(parse_filter(filter), BOOK)


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("lang", r"filter must be a mapping like \{'lang': 'en'\}, not str"),
        ({"year": {"$regex": "x"}}, r"filter\['year'\] has the operator '\$regex'.*there are \$eq, \$ne, .*\$contains"),
        ({"$nor": []}, r"filter has the operator '\$nor'.*\$and, \$or, \$not"),
        ({"year": {}}, r"filter\['year'\] must have one operator"),
        ({"year": {"gte": 3}}, "operator 'gte'"),
        ({"a": ["b"]}, r"filter\['a'\]\['\$eq'\] must be a string, a finite number.*\$in"),
        ({"a": 2**63}, "at most 64 bits"),
        ({"a": float("nan")}, "finite"),
        ({"a": b"x"}, "must be a string"),
        ({"a": {"$in": "bc"}}, r"\['\$in'\] must be a list"),
        ({"a": {"$exists": 1}}, "must be True or False"),
        ({"a": {"$gt": None}}, "others have no order"),
        ({"a": {"$lt": True}}, "others have no order"),
        ({"a": {"$not": 3}}, "must be a mapping"),
        ({"$or": []}, r"filter\['\$or'\] must be a list of at least one filter"),
        ({"$and": {"a": 1}}, "must be a list"),
        ({"$or": [{"a": 1}, {"b": {"$x": 1}}]}, r"filter\['\$or'\]\[1\]\['b'\]"),
        ({3: "x"}, "filter key must be a string"),
        ({"a": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_is_no_filter_is_refused_with_what_there_is(filter, message):
    with pytest.raises(InvalidInputError, match=message):
        parse_filter(filter)


@pytest.mark.parametrize("filter", [{"$or": [{"a": 1}] * 301}, {f"k{i}": 1 for i in range(301)}])
def test_a_filter_of_very_many_parts_is_refused_with_the_way_out(filter):
    with pytest.raises(InvalidInputError, match=r"301 parts.*\$in"):
        parse_filter(filter)


@pytest.mark.parametrize("key", ["$not", "a"])
def test_a_filter_without_end_is_refused(key):
    filter = {"a": {"$gt": 1}}
    for _ in range(500):
        filter = {"$not": filter} if key == "$not" else {"a": {"$not": filter["a"]}}

    with pytest.raises(InvalidInputError, match=r"nested|few in one another"):
        parse_filter(filter)


def test_the_tests_of_all_parts_together_are_bounded():
    with pytest.raises(InvalidInputError, match=r"90000 tests in all"):
        parse_filter({"$and": [{"$or": [{f"k{i}": 1} for i in range(300)]}] * 300})
