"""Judgements, runs and corpora are read strictly: a wrong line stops the reading and is named."""

from __future__ import annotations

import pytest

from qwen_rerank.documents import FileError, read_corpus, read_qrels, read_run, write_run, write_whole
from qwen_rerank.errors import InvalidInputError

HEADER = b"query-id\tcorpus-id\tscore\n"


def test_qrels_are_read_in_both_layouts_with_crlf_and_byte_order_mark(tmp_path):
    trec, beir = tmp_path / "a.qrels", tmp_path / "b.tsv"
    trec.write_bytes("\ufeffq1 0 d1 1\r\nq1\t0\td2 0\r\n".encode())
    beir.write_bytes(HEADER + b"q1\td1\t1\nq1\td2\t0\n")

    assert read_qrels(trec) == read_qrels(beir) == {"q1": {"d1": 1, "d2": 0}}


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        pytest.param(b"q1 0 d1\n", 1, "3 columns", id="missing column"),
        pytest.param(HEADER + b"q1\td1 1\n", 2, "2 columns", id="tab and space mixed"),
        pytest.param(HEADER + b"q1\td1\t\n", 2, "columns", id="empty column"),
        pytest.param(b"q1 0 d1 1\nq1 0 d1 2\n", 2, "judged twice", id="duplicate"),
        pytest.param(b"q1 0 d1 -1\n", 1, "no integer from 0 to 1000", id="negative grade"),
        pytest.param(b"q1 0 d1 1.5\n", 1, "no integer", id="fraction"),
        pytest.param(b"q1 0 d1 NaN\n", 1, "no integer", id="nan"),
        pytest.param(b"q1 0 d1 1\nq\xe9 0 d 1\n", 2, "not UTF-8", id="latin-1"),
        pytest.param(b"", None, "no judgement", id="empty"),
        pytest.param(b"\n\n", None, "no judgement", id="blank"),
    ],
)
def test_a_wrong_line_of_qrels_is_named(tmp_path, content, line, reason):
    path = tmp_path / "q.tsv"
    path.write_bytes(content)

    with pytest.raises(FileError, match=reason) as caught:
        read_qrels(path)

    assert caught.value.line == line
    assert str(path) in str(caught.value)


def test_a_run_comes_back_best_first_and_ties_keep_the_order_of_the_file(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("q1 Q0 a 1 0.5 t\nq1 Q0 b 2 0.9 t\nq1 Q0 c 3 0.5 t\n")

    assert read_run(path) == {"q1": [("b", 0.9), ("a", 0.5), ("c", 0.5)]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param("q1 Q0 a 1 nan t\n", "no finite number", id="nan"),
        pytest.param("q1 Q0 a 1 1e999 t\n", "no finite number", id="too large"),
        pytest.param("q1 Q0 a 1 high t\n", "no finite number", id="word"),
        pytest.param("q1 Q0 a 1 0.5\n", "5 columns", id="missing tag"),
        pytest.param("q1 Q0 a 1 0.5 t\nq1 Q0 a 2 0.4 t\n", "occurs twice", id="duplicate"),
        pytest.param("", "no line", id="empty"),
    ],
)
def test_a_wrong_line_of_a_run_is_named(tmp_path, content, reason):
    path = tmp_path / "run.txt"
    path.write_text(content)

    with pytest.raises(FileError, match=reason):
        read_run(path)


def test_a_written_run_keeps_the_returned_order_through_equal_scores(tmp_path):
    path = tmp_path / "runs" / "out.txt"
    write_run({"q1": [("a", 0.5), ("b", 0.5), ("c", 0.5)]}, path, tag="ours")

    assert [document for document, _ in read_run(path)["q1"]] == ["a", "b", "c"]
    assert path.read_text().splitlines()[0] == "q1 Q0 a 1 3 ours"
    assert [p.name for p in path.parent.iterdir()] == ["out.txt"]


@pytest.mark.parametrize("name", ["two words", "", "tab\there"])
def test_an_id_that_the_format_cannot_carry_is_refused(tmp_path, name):
    with pytest.raises(InvalidInputError, match="TREC run"):
        write_run({"q1": [(name, 1.0)]}, tmp_path / "r", tag="t")


def test_a_corpus_gives_title_and_text_as_one_text(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "1", "title": "T", "text": "x", "year": 1}\n{"_id": "2", "title": "", "text": "y"}\n')

    first, second = read_corpus(path)

    assert (first.text, second.text) == ("T\nx", "y")
    assert first.metadata == {"title": "T", "year": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param("{", "no JSON", id="broken"),
        pytest.param("[]", "JSON object", id="list"),
        pytest.param('{"_id": 1, "text": "x"}', "'_id' must be a string", id="id"),
        pytest.param('{"_id": "1", "text": "\\udc00"}', "lone surrogate", id="surrogate"),
        pytest.param('{"_id": "0", "text": "x"}', "occurs twice", id="twice"),
    ],
)
def test_a_wrong_line_of_a_corpus_is_named(tmp_path, line, reason):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "0", "text": "x"}\n' + line + "\n")

    with pytest.raises(FileError, match=reason) as caught:
        read_corpus(path)

    assert caught.value.line == 2


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "there").mkdir()

    with pytest.raises(FileError, match="there: cannot be written"):
        write_whole("text", tmp_path / "there")
    with pytest.raises(FileError, match="cannot be written"):
        write_whole("text", tmp_path / "there" / "x" / ("n" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
