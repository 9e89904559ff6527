"""Reading documents: what can be read is read, what cannot is named."""

from __future__ import annotations

import os

import pytest

from qwen_rerank.documents import FileError, read_documents
from qwen_rerank.errors import InvalidInputError


def test_a_folder_gives_a_document_for_each_text_file_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("# B\nbeta", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffalpha", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("gamma", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")

    reading = read_documents([tmp_path])

    assert [(d.id, d.text) for d in reading.documents] == [
        ("a.txt", "alpha"),
        ("b.md", "# B\nbeta"),
        ("sub/c.txt", "gamma"),
    ]
    assert (reading.n_files, reading.skipped) == (3, [])


def test_jsonl_lines_keep_id_title_and_metadata(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "7", "title": "T", "text": "a\u2028b", "lang": "zh"}\n\n{"text": "c"}\n', encoding="utf-8")

    first, second = read_documents([path]).documents

    assert (first.id, first.text) == ("7", "T\na\u2028b")
    assert first.metadata == {"title": "T", "lang": "zh", "source": "corpus.jsonl:1"}
    assert (len(second.id), second.text) == (32, "c")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param("{", "no JSON", id="broken"),
        pytest.param("[" * 100_000, "no JSON", id="deep"),
        pytest.param("[1]", "a JSON object is wanted, not list", id="no object"),
        pytest.param('{"text": 3}', "no text under any of", id="no text"),
        pytest.param('{"text": "\\ud800"}', "lone surrogate", id="surrogate"),
        pytest.param('{"id": "a", "text": "again"}', "occurs twice", id="same id"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, reason):
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n' + line + '\n{"id": "b", "text": "y"}\n', encoding="utf-8")

    reading = read_documents([path])

    assert [d.id for d in reading.documents] == ["a", "b"]
    (skipped,) = reading.skipped
    assert reason in skipped.reason


def test_csv_rows_become_documents_and_other_columns_metadata(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('id,text,price\r\nk1,"two\r\nlines",9\r\n,,\r\n', encoding="utf-8")

    reading = read_documents([path])

    (document,) = reading.documents
    assert (document.id, document.text, document.metadata["price"]) == ("k1", "two\r\nlines", "9")
    assert "no text" in reading.skipped[0].reason


def test_unreadable_files_are_named_and_skipped(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("  ")
    (tmp_path / "good.txt").write_text("good")

    reading = read_documents([tmp_path])

    assert [d.id for d in reading.documents] == ["good.txt"]
    assert [s.where for s in reading.skipped] == ["empty.txt", "latin.txt"]
    assert "not UTF-8" in reading.skipped[1].reason


@pytest.mark.parametrize("name", ["missing", "picture.png"])
def test_a_path_that_gives_nothing_is_an_error(tmp_path, name):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")

    with pytest.raises(InvalidInputError, match=name):
        read_documents([tmp_path / name])


def test_strictly_read_the_first_thing_that_gives_no_document_is_an_error(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')

    with pytest.raises(FileError, match=r"d\.jsonl:2: no text under any of"):
        read_documents([path], strictness="strict")
    with pytest.raises(InvalidInputError, match="strictness must be one of"):
        read_documents([path], strictness="loose")


def test_a_line_that_is_not_utf8_costs_itself_alone(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n')

    reading = read_documents([path])

    assert [d.text for d in reading.documents] == ["a", "b"]
    assert [(s.where, s.reason[:9]) for s in reading.skipped] == [("d.jsonl:2", "not UTF-8")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_a_folder_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")

    assert read_documents([tmp_path]).n_files == 0
