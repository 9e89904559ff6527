"""Rows become texts; what is no row is named and costs itself alone."""

from __future__ import annotations

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.converters import KINDS


def read(text, *, suffix=".csv", column=None):
    kind = KINDS[suffix]
    return kind.convert(text.encode(), column, kind.limits)


def test_without_a_text_column_all_columns_are_read():
    (row,) = read("编号,名称,说明\n1,键盘,机械\n").sections

    assert (row.text, row.line) == ("编号: 1\n名称: 键盘\n说明: 机械", 2)
    assert read("question,answer\nwhen?,in June\n").sections[0].text == "question: when?\nanswer: in June"


def test_a_text_column_can_be_named_and_the_others_are_metadata():
    (row,) = read("编号,说明\n1,机械\n", column="说明").sections

    assert (row.text, row.place) == ("机械", {"fields": {"编号": "1"}})
    with pytest.raises(
        InvalidInputError, match=r"no column '正文'; the columns are '编号', '说明': name one with --text-column"
    ):
        read("编号,说明\n1,机械\n", column="正文")


def test_a_known_text_column_comes_with_its_title():
    assert read("id;title;text\n1;T;body\n").sections[0].text == "T\nbody"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param('2,"no end', "unexpected end of data", id="stray quote"),
        pytest.param('2,"a"b', "expected after", id="quote inside"),
        pytest.param("2," + "x" * 140_000, "larger than field limit", id="a field of 140,000 characters"),
        pytest.param("2, ", "", id="blank cell"),
    ],
)
def test_a_bad_record_costs_itself_alone(bad, reason):
    found = read(f"id,text\n1,a\n{bad}\n3,c\n4,d\n")

    assert [one.text for one in found.sections] == ["a", "c", "d"]
    assert [(line, reason in why) for line, why in found.refused] == [(3, True)]


def test_a_record_may_run_over_several_lines():
    found = read('id,text\n1,"two\nlines"\n2,b\n')

    assert [(one.line, one.text) for one in found.sections] == [(2, "two\nlines"), (4, "b")]


def test_a_cell_may_hold_what_python_takes_for_a_line_end():
    found = read("id,text\n1,a\u2028b\x0cc\x85d\n2,e\n")

    assert [(one.line, one.text) for one in found.sections] == [(2, "a\u2028b\x0cc\x85d"), (3, "e")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "a JSON object is wanted, not list"),
        ('{"text": "a", "price": NaN}', "'price' is nothing that JSON can carry"),
        ('{"text": "a", "note": "\\ud800"}', "'note' is nothing that JSON can carry"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": ""}', "no text"),
    ],
)
def test_a_bad_json_line_is_named_with_its_key_and_the_others_are_read(line, reason):
    found = read(f'{{"text": "a", "n": 1}}\n{line}\n{{"text": "b"}}\n', suffix=".jsonl")

    assert [one.text for one in found.sections] == ["a", "b"]
    assert found.sections[0].place["fields"] == {"n": 1}
    assert [(number, reason in why) for number, why in found.refused] == [(2, True)]
