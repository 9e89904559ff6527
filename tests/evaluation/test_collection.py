"""Collections: what is used, what is left out, and that both are said."""

from __future__ import annotations

import json

import pytest

from qwen_rerank.documents import FileError
from qwen_rerank.evaluation.collection import load_beir, load_pairs
from qwen_rerank.types import Document


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mini"
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{i}", "text": f"t{i}"}) + "\n" for i in range(3)))
    (root / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{i}", "text": f"w{i}"}) + "\n" for i in range(4)))
    (root / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\tgone\t1\nq1\td1\t0\nq2\td2\t2\n"
    )
    return root


def test_what_is_left_out_is_counted(folder):
    collection = load_beir(folder)

    assert collection.queries == {"q0": "w0", "q2": "w2"}
    assert collection.qrels == {"q0": {"d0": 1}, "q2": {"d2": 2}}
    assert [note.split()[0] for note in collection.notes] == ["1", "1", "1"]


def test_an_unknown_split_names_those_that_exist(folder):
    with pytest.raises(FileError, match="there are: test"):
        load_beir(folder, split="dev")


def test_a_judged_query_without_text_is_an_error(folder):
    (folder / "queries.jsonl").write_text('{"_id": "q0", "text": "w0"}\n')

    with pytest.raises(FileError, match="1 judged queries have no text"):
        load_beir(folder)


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(FileError, match=r"corpus\.jsonl or corpus\.jsonl\.gz"):
        load_beir(tmp_path)


def test_labels_of_your_own_make_a_collection(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"query": "keyboard", "relevant": ["a"]}\n{"query": "mouse", "relevant": ["b", "zzz"]}\n')

    collection = load_pairs(path, [Document("a", "x"), Document("b", "y")])

    assert sorted(collection.queries.values()) == ["keyboard", "mouse"]
    assert sorted(map(len, collection.qrels.values())) == [1, 1]


def test_every_shipped_collection_is_read_to_the_last_line(shared):
    for root in sorted(path for path in (shared / "data").iterdir() if path.is_dir()):
        collection = load_beir(root)
        assert set(collection.queries) == set(collection.qrels)
