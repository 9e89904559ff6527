"""Every line becomes an example or is named with its place."""

from __future__ import annotations

import json

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.training import load_training_data

GOOD = {"query": "q", "positive": "a", "negatives": ["b", "c"]}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_positives_and_negatives_become_labels(tmp_path):
    [example] = load_training_data(write(tmp_path / "d.jsonl", GOOD)).examples

    assert (example.documents, example.scores, example.teacher) == (("a", "b", "c"), (1.0, 0.0, 0.0), False)


def test_documents_with_scores_are_a_teachers(tmp_path):
    row = {"query": "q", "documents": ["a", "b"], "scores": [2.5, -1]}

    [example] = load_training_data(write(tmp_path / "d.jsonl", row)).examples

    assert (example.scores, example.teacher) == ((2.5, -1.0), True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "no JSON"),
        ([1], "a JSON object is wanted"),
        ({"query": "", "positive": "a"}, "query is empty"),
        ({"query": "q"}, "no positive"),
        ({"query": "q", "positive": "a", "negative": "a"}, "both positive and negative"),
        ({"query": "q", "documents": ["a"], "scores": []}, "1 documents have 0 scores"),
        ({"query": "q", "documents": ["a"], "scores": [True]}, "finite numbers"),
        ({"query": "q", "positive": [3]}, "positive"),
    ],
)
def test_a_bad_line_is_named_and_counted(tmp_path, row, reason):
    path = write(tmp_path / "d.jsonl", GOOD, row)

    with pytest.raises(InvalidInputError, match=rf"1 line\(s\) cannot be used: d.jsonl:2: .*{reason}"):
        load_training_data(path)

    data = load_training_data(path, skip_bad_lines=True)
    assert (len(data.examples), [bad.where for bad in data.bad_lines]) == (1, ["d.jsonl:2"])


def test_a_beir_folder_is_read_with_its_explicit_zeros(tmp_path):
    write(tmp_path / "corpus.jsonl", {"_id": "1", "title": "T", "text": "a"}, {"_id": "2", "text": "b"})
    write(tmp_path / "queries.jsonl", {"_id": "x", "text": "q"})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nx\t1\t1\nx\t2\t0\nx\t9\t1\n")

    data = load_training_data(tmp_path, skip_bad_lines=True)

    assert data.examples[0].documents == ("T\na", "b")
    assert data.examples[0].scores == (1.0, 0.0)
    assert [bad.where for bad in data.bad_lines] == ["train.tsv:4"]
