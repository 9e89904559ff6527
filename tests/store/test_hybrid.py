"""Vectors and words in one store: modes, stores that have only one of them, and what is fused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from qwen_rerank import BM25Index, Document, FaissStore
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.fusion import HYBRID_K, rank_fusion
from qwen_rerank.store import EmbedderMismatchError, StoreReadOnlyError
from tests.store.conftest import FRUIT


def ids(candidates):
    return [candidate.document.id for candidate in candidates]


def test_hybrid_is_the_default_and_the_fusion_of_both_halves(store):
    halves = [store.search("red apple", 200, mode=mode) for mode in ("dense", "lexical")]

    assert (
        store.search("red apple", 3)
        == store.search("red apple", 3, mode="hybrid")
        == rank_fusion(halves, k=HYBRID_K)[:3]
    )


@pytest.mark.parametrize(
    ("mode", "kind"), [("dense", "cosine"), ("lexical", "bm25"), ("hybrid", "fused"), (None, "fused")]
)
def test_every_score_says_what_it_is(store, mode, kind):
    assert {hit.score_kind for hit in store.search("red apple", 3, mode=mode)} == {kind}


def test_a_lexical_search_is_that_of_a_bm25_index(store):
    for query in ("red apple tree", "紅色的蘋果", "nowhere"):
        assert store.search(query, 9, mode="lexical") == BM25Index(FRUIT).search(query, 9)


def test_words_find_what_vectors_cannot(store):
    store.add([Document("code", "E1234")], vectors=-np.ones((1, 32)))

    assert ids(store.search("E1234", 1)) == ids(store.search("E1234", 1, mode="lexical")) == ["code"]


@pytest.mark.parametrize("mode", ["", "bm25", 3, "Dense"])
def test_an_unknown_mode_is_refused(store, mode):
    with pytest.raises(InvalidInputError, match="mode must be one of 'hybrid', 'dense', 'lexical'"):
        store.search("apple", mode=mode)


def test_a_store_of_words_alone_needs_no_embedder(path):
    with FaissStore.create(path, None) as store:
        store.add(FRUIT)
        assert ids(store.search("red apple", 1)) == ["apple"]
        with pytest.raises(InvalidInputError, match="made without an embedder"):
            store.search("apple", mode="dense")
    with FaissStore.open(path, None) as again:
        again.delete(["apple"])
        assert (ids(again.search("grows", 9)), again.verify().ok) == (["pear", "carrot"], True)


def test_a_store_of_words_alone_loads_no_faiss(path):
    import subprocess
    import sys

    code = "import sys\nfrom qwen_rerank import FaissStore\nFaissStore.create(sys.argv[1], None).add(['apple'])\nprint('faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


def test_a_store_of_words_alone_refuses_an_embedder(path, embedder):
    FaissStore.create(path, None).close()

    with pytest.raises(EmbedderMismatchError, match="words alone"):
        FaissStore.open(path, embedder)


def test_without_its_embedder_a_store_is_searched_by_words(store, path, embedder):
    store.close()

    with FaissStore.open(path, None) as plain:
        assert ids(plain.search("red apple", 1)) == ["apple"]
        assert plain.search_vectors(embedder.embed_queries(["pear"]), 1)
        for call in (lambda: plain.search("apple", mode="hybrid"), lambda: plain.add(["new"])):
            with pytest.raises(InvalidInputError, match="opened without an embedder"):
                call()
        plain.add([Document("plum", "plum")], vectors=embedder.embed_documents(["plum"]))
        assert (plain.verify().ok, ids(plain.search("plum", 1))) == (True, ["plum"])


def test_a_store_without_words_stays_dense_until_they_are_built(path, embedder):
    with FaissStore.create(path, embedder, words=False) as store:
        store.add(FRUIT)
        assert {hit.score_kind for hit in store.search("red apple")} == {"cosine"}
        with pytest.raises(InvalidInputError, match=r"build_words\(\)"):
            store.search("apple", mode="hybrid")
        before = store.search("red apple", 9)
        store.build_words()
        store.build_words()
        assert store.search("red apple", 9, mode="dense") == before
        assert store.search("red apple", 9, mode="lexical") == BM25Index(FRUIT).search("red apple", 9)
    with FaissStore.open(path, embedder) as again:
        assert {hit.score_kind for hit in again.search("red apple")} == {"fused"}
        assert again.verify().ok


def test_a_reader_follows_when_words_are_built(path, embedder):
    with (
        FaissStore.create(path, embedder, words=False) as store,
        FaissStore.open(path, embedder, read_only=True) as reader,
    ):
        store.add(FRUIT)
        store.build_words()

        assert ids(reader.search("red apple", 1, mode="lexical")) == ["apple"]
        with pytest.raises(StoreReadOnlyError):
            reader.build_words()


def test_after_a_crash_the_words_are_those_of_the_last_commit(store, path, embedder, tmp_path):
    store.save()
    store.add([Document("plum", "purple plum")])
    store.delete(["apple"])
    store.update_metadata({"pear": {"year": 2030}})
    shutil.copytree(path, tmp_path / "crashed")

    with FaissStore.open(tmp_path / "crashed", embedder) as crashed:
        assert crashed.search("red purple tree", 9, mode="lexical") == BM25Index(crashed).search("red purple tree", 9)
        assert crashed.verify().ok


def test_many_queries_are_answered_as_one_by_one(store):
    queries = ["red apple", "?!", "carrot 苹果"]

    for mode in ("hybrid", "dense", "lexical"):
        expected = [store.search(query, 3, mode=mode) for query in queries]
        assert store.search_many(queries, 3, mode=mode) == expected
    assert store.search_many([]) == []
    with pytest.raises(InvalidInputError, match=r"queries\[1\] is empty"):
        store.search_many(["apple", " "])
