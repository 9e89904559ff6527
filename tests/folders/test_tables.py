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
        pytest.param("2, ", "", id="blank cell"),
    ],
)
def test_a_bad_record_costs_itself_alone(bad, reason):
    found = read(f"id,text\n1,a\n{bad}\n3,c\n4,d\n")

    assert [one.text for one in found.sections] == ["a", "c", "d"]
    assert [(line, reason in why) for line, why in found.refused] == [(3, True)]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        pytest.param("name,price,price\nfoo,1,2\n", {"name": "foo", "price": "1", "price 2": "2"}, id="two of a name"),
        pytest.param("a,a,a 2\n1,2,3\n", {"a": "1", "a 2": "2", "a 2 2": "3"}, id="a name that is taken"),
        pytest.param("\n\nid,x\n1,2\n", {"id": "1", "x": "2"}, id="blank lines above"),
        pytest.param("sep=|\nid|x\n1|2,3\n", {"id": "1", "x": "2,3"}, id="Excel's line"),
    ],
)
def test_every_column_has_a_name_of_its_own(text, fields):
    assert read(text).sections[0].place["fields"] == fields


def test_a_long_document_in_a_cell_is_one_row():
    long = "a line of it\n" * 9_000

    assert [one.text for one in read(f'id,text\n1,"{long}"\n2,b\n').sections] == [long, "b"]


def test_a_row_deeper_than_a_store_takes_costs_itself_alone():
    deep = "[" * 80 + "]" * 80

    found = read(f'{{"text": "a", "x": {deep}, "pad": "{"x" * 70_000}"}}\n{{"text": "b"}}\n', suffix=".jsonl")
    assert [one.text for one in found.sections] == ["b"]
    assert found.refused == [(1, "the row is nested deeper than 64 levels.")]


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
