"""Answers say where they stand and which words of the query are in them."""

from __future__ import annotations

import os

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders import sync_folder
from qwen_rerank.folders.excerpts import around, file_filter, joined, place_of, word_spans
from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "long.md").write_text("\n".join(f"Tenant {n} leaves in June." for n in range(40)))
    (folder / "狗.txt").write_text("狗在六点吃饭。", encoding="utf-8")
    os.utime(folder / "long.md", (1_000_000_000, 1_000_000_000))
    with FaissStore.create(tmp_path / "store", HashEmbedder(64)) as made:
        sync_folder(made, [folder], tokens=40, overlap=12)
        yield made


@pytest.mark.parametrize(
    ("metadata", "place"),
    [
        ({}, "the id"),
        ({"source": "a/b.md", "line": 7}, "a/b.md:7"),
        ({"source": "a/b.pdf", "page": 3}, "a/b.pdf, page 3"),
        ({"source": "a/b.pptx", "slide": 2}, "a/b.pptx, slide 2"),
        ({"source": "a/b.xlsx", "sheet": "租", "row": 9}, "a/b.xlsx, 租 row 9"),
        ({"source": "a/b.docx"}, "a/b.docx"),
    ],
)
def test_a_place_is_a_line_or_whatever_the_file_has(metadata, place):
    assert place_of(Document("the id", "text", metadata)) == place


@pytest.mark.parametrize(
    ("text", "query", "words"),
    [
        ("The Leases end; release", "when does the lease end", ["Lease", "end"]),
        ("租约于六月结束", "租约什么时候结束", ["租约", "结束"]),
        ("机械键盘", "机械键盘", ["机械键盘"]),
        ("a (b)", "?!", []),
    ],
)
def test_words_of_the_query_are_found(text, query, words):
    assert [text[start:end] for start, end in word_spans(text, query)] == words


def test_what_stands_around_a_passage_joins_to_the_file(store):
    n = len(store.ids(filter={"path": "long.md"}))
    (middle,) = store.get(["notes/long.md#3"])

    above, below = around(store, middle, n)
    assert [d.metadata["part"] for d in above] == [1, 2]
    assert joined([*above, middle, *below]) == "\n".join(f"Tenant {n} leaves in June." for n in range(40))
    assert around(store, Document("x", "by hand"), 2) == ([], [])


def test_files_are_chosen_by_path_suffix_and_date(store):
    def found(**wanted):
        return {one.partition("#")[0] for one in store.ids(filter=file_filter(store, **wanted))}

    assert file_filter(store) is None
    assert found(paths=["notes/*.txt"]) == found(suffixes=["TXT"]) == found(since="2020-01-01") == {"notes/狗.txt"}
    assert found(paths=["long.*"]) == found(until="2001-09-09") == {"notes/long.md"}
    with pytest.raises(InvalidInputError, match="since must be a date such as"):
        file_filter(store, since="yesterday")
    with pytest.raises(InvalidInputError, match=r"no file of .* fits 'nothing'"):
        file_filter(store, paths=["nothing"])
