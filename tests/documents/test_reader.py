"""One reader under all files: bounded, exact about places, and as strict as it is told to be."""

from __future__ import annotations

import gzip

import pytest

from qwen_rerank.documents import FileError, read_corpus, reader
from qwen_rerank.documents.reader import TextFile
from qwen_rerank.errors import InvalidInputError


def parse(line):
    if line == "bad":
        raise InvalidInputError("it is bad.")
    return line.upper()


def test_the_same_line_is_an_error_or_is_noted(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffone\r\n\nbad\ntwo".encode())
    skipped = []

    patient = TextFile(path, skipped=skipped, name="shown")
    assert list(patient.each(patient.lines(), parse)) == [(1, "ONE"), (4, "TWO")]
    assert [(entry.where, entry.reason) for entry in skipped] == [("shown:3", "it is bad.")]

    strict = TextFile(path)
    with pytest.raises(FileError, match=r"x\.txt:3: it is bad\.") as caught:
        list(strict.each(strict.lines(), parse))
    assert (caught.value.path, caught.value.line, caught.value.reason) == (str(path), 3, "it is bad.")


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "b\u2028c"}\n', encoding="utf-8")
    assert list(TextFile(path).objects()) == [(1, {"a": "b\u2028c"})]


def test_a_gzip_that_is_none_or_breaks_off_is_an_error(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "1", "text": "x"}\n' * 1000)[:40])

    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        with pytest.raises(FileError, match="cannot be read"):
            read_corpus(tmp_path / name)


def test_a_line_or_a_gzip_without_end_is_cut_off_at_the_limit(tmp_path, monkeypatch):
    """Also where bad lines are skipped: the rest of such a file is not looked at."""
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 5000)
    (tmp_path / "line.gz").write_bytes(gzip.compress(b" " * 1_000_000))
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b" \n" * 1_000_000))

    for name, reason in (("line.gz", "longer than 1000 bytes"), ("bomb.gz", "more than 5000 bytes")):
        with pytest.raises(FileError, match=reason):
            list(TextFile(tmp_path / name).lines())
        skipped = []
        assert list(TextFile(tmp_path / name, skipped=skipped).lines()) == []
        assert reason in skipped[0].reason


def test_a_text_without_end_is_not_read(tmp_path):
    with (tmp_path / "x.txt").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    skipped = []

    assert list(TextFile(tmp_path / "x.txt", skipped=skipped).lines()) == []
    assert "longer than" in skipped[0].reason


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match=r"nothing\.txt: cannot be read"):
        list(TextFile(tmp_path / "nothing.txt").lines())
