"""`qwen-rerank store …`: a store from making to moving, on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qwen_rerank import FaissStore
from qwen_rerank.cli import app
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.testing import HashEmbedder

runner = CliRunner()


class NamedEmbedder(HashEmbedder):
    name = "hash"


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr("qwen_rerank.embedders.load_embedder", lambda name: NamedEmbedder(64))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"id": f"d{n}", "text": f"apple tree {n}", "year": 2000 + n} for n in range(25)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def store(tmp_path, rows):
    path = tmp_path / "store"
    run("create", path, "--embedder", "hash", "--field", "year")
    run("add", path, rows, "--batch", "10")
    return path


def run(*arguments, code=0):
    result = runner.invoke(app, ["store", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def opened(path):
    return FaissStore.open(path, NamedEmbedder(64), read_only=True)


def test_create_and_add(store):
    with opened(store) as found:
        assert len(found) == 25
        assert found.statistics().indexed_fields == ("year",)


def test_an_add_that_was_killed_goes_on_where_it_was(store, rows, monkeypatch):
    """What is there unchanged is neither embedded nor stored again."""
    run("delete", store, "d7")
    embedded = []
    real = HashEmbedder.embed_documents
    monkeypatch.setattr(
        HashEmbedder, "embed_documents", lambda self, texts: embedded.extend(texts) or real(self, texts)
    )

    assert "1 added, 0 replaced, 24 were there already" in run("add", store, rows)
    assert embedded == ["apple tree 7"]


def test_what_an_add_replaces_is_named(store, tmp_path):
    """Files of one name from two folders, added one after the other, are one document: nothing goes without a word."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(name)

    assert "Replaced" not in run("add", store, tmp_path / "a")
    assert "Replaced: README.md. Of files of one name" in run("add", store, tmp_path / "b")


def test_info_as_text_and_json(store):
    assert "documents       25" in run("info", store)
    found = json.loads(run("info", store, "--json"))
    assert (found["documents"], found["embedder"], found["words"]) == (25, "hash", True)


def test_verify_tells_and_exits_with_1(store):
    assert run("verify", store) == "25 documents, all sound.\n"
    file = store / "documents.sqlite3"
    data = bytearray(file.read_bytes())
    data[data.index(b"apple tree 3")] ^= 1
    file.write_bytes(data)

    assert "does not match its digest" in run("verify", store, code=1)


def test_delete_by_filter_and_compact(store):
    assert "5 deleted" in run("delete", store, "--filter", '{"year": {"$lt": 2005}}')
    assert "0 deleted; not there: nobody" in run("delete", store, "nobody")
    assert "holds 20 documents" in run("compact", store)


@pytest.mark.parametrize("filter", ["{", '{"a": {"$x": 1}}', "[1]", "[" * 100_000, '{"a": ' + "9" * 5_000 + "}"])
def test_a_filter_that_is_none_is_refused(store, filter):
    result = runner.invoke(app, ["store", "delete", str(store), "--filter", filter])

    assert isinstance(result.exception, InvalidInputError)


def test_tune(store, tmp_path):
    assert "nothing to tune" in run("tune", store)
    path = tmp_path / "graph"
    run("create", path, "--index", "HNSW8", "--embedder", "hash")
    run("add", path, tmp_path / "rows.jsonl")
    (tmp_path / "queries.txt").write_text("apple\ntree 3\n")

    found = run("tune", path, "--queries", tmp_path / "queries.txt")
    assert "1.0000" in found
    assert "No effort" not in found
    (tmp_path / "queries.txt").write_text("apple\n")
    assert "the last one is kept.\nOne query tells" in run("tune", path, "--queries", tmp_path / "queries.txt")


def test_export_and_import(store, tmp_path):
    run("export", store, tmp_path / "export")
    run("import", tmp_path / "again", tmp_path / "export")

    with opened(store) as a, opened(tmp_path / "again") as b:
        assert a.search("apple tree 3", 5) == b.search("apple tree 3", 5)


def test_a_store_of_words_alone(tmp_path, rows):
    run("create", tmp_path / "words", "--words-only")
    run("add", tmp_path / "words", rows)

    with FaissStore.open(tmp_path / "words", None) as found:
        assert found.search("apple tree 3", 1)[0].document.id == "d3"


def test_indexing_into_an_empty_folder_makes_the_store_there(tmp_path, rows):
    (tmp_path / "volume").mkdir()
    result = runner.invoke(app, ["index", str(rows), "--store", str(tmp_path / "volume")])

    assert result.exit_code == 0
    assert "now holds 25" in result.output
