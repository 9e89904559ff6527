"""Queries come out of three layouts, and what is no query is named."""

from __future__ import annotations

import pytest

from qwen_rerank.documents import FileError, read_queries

LAYOUTS = {
    "q.jsonl": '{"_id": "1", "text": "red cars"}\n{"_id": "2", "text": "a & b"}\n',
    "q.tsv": "1\tred cars\n2\ta & b\n",
    "old.topics": "<top>\n<num> Number: 1\n<title> Topic: red\ncars\n</top>\n<top>\n<num> 2\n<title> a &amp; b\n</top>\n",
    "new.xml": '<topics>\n<topic number="1">\n<query>red cars</query></topic>\n<topic number="2">a &amp; b</topic></topics>\n',
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_queries(tmp_path, name):
    (tmp_path / name).write_text(LAYOUTS[name])
    assert read_queries(tmp_path / name) == {"1": "red cars", "2": "a & b"}


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("q.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n', 2, "the id '1' occurs twice"),
        ("q.jsonl", '{"_id": "1"}\n', 1, "'text' must be a string"),
        ("q.tsv", "1\ta\n2 b\n", 2, "no tab"),
        ("q.tsv", "1\ta\n2\t \n", 2, "is empty"),
        ("q.tsv", "\ta\n", 1, "has no id"),
        ("q.tsv", "", None, "holds no query"),
        ("q.xml", "<top>\n<num> 1\n</top>\n", 1, "no <num> or no <title>"),
    ],
)
def test_what_is_no_query_is_named(tmp_path, name, content, line, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=reason) as caught:
        read_queries(tmp_path / name)
    assert caught.value.line == line


def test_what_is_no_query_can_be_skipped(tmp_path):
    (tmp_path / "q.tsv").write_text("1\ta\nnothing\n1\tagain\n2\tb\n")
    skipped = []
    assert read_queries(tmp_path / "q.tsv", skipped=skipped) == {"1": "a", "2": "b"}
    assert [entry.where for entry in skipped] == ["q.tsv:2", "q.tsv:3"]
