"""Files as whole documents, for commands that do not cut them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders import read_files
from qwen_rerank.types import text_id
from tests.folders import files


def test_a_file_is_one_document_word_for_word(tmp_path):
    text = "# A\n\na\n\n## B\n\n```\n# no\n```\n"
    (tmp_path / "a.md").write_text(text)
    files.word(tmp_path / "租约.docx", *files.ZH)

    first, second = read_files([tmp_path]).documents
    assert (first.id, first.text, first.metadata) == ("a.md", text, {"source": "a.md"})
    assert (second.id, files.ZH[1] in second.text) == ("租约.docx", True)


def test_a_row_is_one_document_with_its_own_id(tmp_path):
    rows = '{"_id": 7, "title": "T", "text": "a", "lang": "zh", "metadata": {"x": 1}}\n{"text": "b"}\n{"id": "7", "text": "c"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    files.sheet(tmp_path / "sheet.xlsx", *files.EN)

    reading = read_files([tmp_path])
    first, second, flat, _ = reading.documents
    assert (first.id, first.text) == ("7", "T\na")
    assert first.metadata == {"title": "T", "lang": "zh", "x": 1, "source": "rows.jsonl:1"}
    assert (len(second.id), second.text, flat.metadata["source"]) == (32, "b", "sheet.xlsx:Lease:2")
    assert [(one.where, one.reason) for one in reading.skipped] == [("rows.jsonl:3", "the id '7' occurs twice.")]


def test_an_id_is_a_text_or_a_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"id": 0, "text": "a"}\n{"id": false, "text": "b"}\n{"id": [1], "text": "c"}\n'
    )

    assert [one.id for one in read_files([tmp_path]).documents] == ["0", text_id("b"), text_id("c")]


def test_two_files_of_one_name_are_two_documents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "docs").mkdir(parents=True)
        (tmp_path / name / "docs" / "README.md").write_text(name)

    reading = read_files([tmp_path / "a" / "docs", tmp_path / "b" / "docs"])
    assert {one.id: one.text for one in reading.documents} == {"README.md": "a", "docs/README.md": "b"}
    assert {one.id: one.metadata["source"] for one in reading.documents}["docs/README.md"] == "docs/README.md"


def test_what_gives_no_document_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "b.pdf").write_text("x")
    (tmp_path / "c.jsonl").write_text('{"text": "c", "price": NaN}\n{"text": "d"}\n')

    reading = read_files([tmp_path])
    assert {one.where: one.reason.split(" (")[0] for one in reading.skipped} == {
        "a.png": "no kind that can be read",
        "blank.txt": "it has no text",
        "b.pdf": "no readable PDF",
        "c.jsonl:1": "'price' is nothing that JSON can carry",
    }
    with pytest.raises(InvalidInputError, match="does not exist"):
        read_files([tmp_path / "nothing"])


def test_a_file_larger_than_its_kind_may_be_is_named_and_not_read(tmp_path):
    """A file that a program left half written may say that it has terabytes."""
    (tmp_path / "a.txt").write_text("a")
    for name in ("big.md", "big.csv", "big.pdf"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 41)

    reading = read_files([tmp_path])

    assert [document.id for document in reading.documents] == ["a.txt"]
    assert [one.reason.partition(" at most")[0] for one in reading.skipped] == [f"{1 << 41} bytes; of this kind"] * 3


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """Folders in one another, more than Python's calls may be deep; pytest could not remove them."""
    monkeypatch.chdir(tmp_path)
    for _ in range(1_100):
        os.mkdir("a")
        os.chdir("a")
    Path("last.txt").write_text("at the end")
    yield tmp_path
    os.unlink("last.txt")
    for _ in range(1_100):
        os.chdir("..")
        os.rmdir("a")


def test_folders_in_one_another_without_end_are_read_to_the_last(deep):
    assert [document.text for document in read_files([deep]).documents] == ["at the end"]


@pytest.mark.parametrize(
    ("paths", "options", "said"),
    [
        (5, {}, "paths must be folders or files, not int"),
        ([None], {}, "paths must be folders or files; None is neither"),
        (["."], {"text_column": ["a"]}, "text_column must be a string, not list"),
    ],
)
def test_a_wrong_argument_is_one_sentence(paths, options, said):
    with pytest.raises(InvalidInputError, match=said):
        read_files(paths, **options)
