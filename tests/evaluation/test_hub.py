"""A data set of the hub, here as a folder: read as strictly as files are."""

from __future__ import annotations

import json

import pytest

from qwen_rerank.documents import FileError

datasets = pytest.importorskip("datasets")
from qwen_rerank.evaluation.hub import load_hub  # noqa: E402 (needs the package)

CARD = """---
configs:
- config_name: corpus
  data_files: corpus.jsonl
- config_name: queries
  data_files: queries.jsonl
- config_name: default
  data_files: qrels.jsonl
---
"""


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Write a data set of three tables whose rows may be replaced; its ids are numbers, as some have them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(**tables):
        rows = {
            "corpus": [{"_id": 1, "title": "T", "text": "red"}, {"_id": 2, "title": "", "text": "blue"}],
            "queries": [{"_id": 7, "text": "colour"}],
            "qrels": [{"query-id": 7, "corpus-id": 1, "score": 1.0}, {"query-id": 7, "corpus-id": 2, "score": 0.0}],
        }
        folder = tmp_path / "mini"
        folder.mkdir()
        (folder / "README.md").write_text(CARD)
        for name, table in (rows | tables).items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        return str(folder)

    return write


def test_the_three_tables_become_a_collection(data_set):
    collection = load_hub(data_set())

    assert [(d.id, d.text) for d in collection.documents] == [("1", "T\nred"), ("2", "blue")]
    assert (collection.queries, collection.qrels) == ({"7": "colour"}, {"7": {"1": 1, "2": 0}})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"corpus": [{"_id": 1, "text": "a"}, {"_id": 1, "text": "b"}]}, "corpus:2: the id '1' occurs twice"),
        ({"corpus": [{"text": "a"}]}, "corpus:1: '_id' must be a string"),
        ({"queries": [{"_id": 7, "text": " "}]}, "queries:1: the query '7' is empty"),
        ({"qrels": [{"query-id": 7, "corpus-id": 1, "score": 0.5}]}, "qrels:1: the grade 0.5 is no integer"),
        ({"qrels": [{"query-id": 7, "score": 1.0}]}, "qrels:1: a judgement needs query-id, corpus-id and score"),
    ],
)
def test_a_wrong_row_is_named(data_set, tables, message):
    with pytest.raises(FileError, match=message):
        load_hub(data_set(**tables))
