"""A store that the first format made, before there were words, opens as it was and takes what is new."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from qwen_rerank import BM25Index, Document, FaissStore
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store.commits import StoreSettings
from qwen_rerank.testing import HashEmbedder

EMBEDDER = HashEmbedder(16)
IDS = ["d0", "d1", "d4", "d5", "d3"]  # in order of arrival


@pytest.fixture
def old(tmp_path) -> Path:
    with tarfile.open(Path(__file__).with_name("format_1.tar.gz")) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / "store"


def record(path: Path) -> dict[str, object]:
    return json.loads((path / "commit.json").read_text())


@pytest.mark.parametrize("read_only", [True, False])
def test_it_opens_stays_dense_and_stays_in_its_format(old, read_only):
    with FaissStore.open(old, EMBEDDER, read_only=read_only) as store:
        assert store.ids() == IDS
        assert [hit.score_kind for hit in store.search("green pear", 2)] == ["cosine", "cosine"]
        assert store.search("green pear", 1)[0].document == Document("d3", "a green pear", {"n": 33})
        assert len(store.search("apple", 9, filter={"n": {"$lt": 5}})) == 3
        with pytest.raises(InvalidInputError, match="build_words"):
            store.search("apple", mode="hybrid")
        assert store.verify().ok
    assert record(old)["format"] == 1


def test_it_can_be_written_to_and_stays_in_its_format(old):
    with FaissStore.open(old, EMBEDDER) as store:
        store.upsert([Document("d1", "a purple plum"), Document("new", "a blue berry")])

    assert record(old)["format"] == 1
    with FaissStore.open(old, EMBEDDER) as store:
        assert (len(store), store.verify().ok) == (6, True)


def test_words_and_fields_take_it_to_the_next_format(old):
    with FaissStore.open(old, EMBEDDER) as store:
        store.build_words()
        store.declare(["n"])

    assert record(old)["format"] == 2
    with FaissStore.open(old, EMBEDDER) as store:
        assert store.search("green apple", 9, mode="lexical") == BM25Index(store).search("green apple", 9)
        assert store.search("green pear", 1)[0].score_kind == "fused"
        assert store.verify().ok


def test_a_setting_that_format_2_does_not_know_needs_a_new_number():
    """The settings are part of what every commit signs: one more in the same format, and older stores read as corrupt."""
    known = {
        "store",
        "embedder",
        "fingerprint",
        "dim",
        "metric",
        "index",
        "words",
        "indexed_fields",
        "vectors",
        "effort",
    }
    settings = StoreSettings(store="", embedder="", fingerprint="", dim=1, metric="ip", index="Flat", words=True)

    assert (settings.format, set(settings.encoded())) == (2, known)
