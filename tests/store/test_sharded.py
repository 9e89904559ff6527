"""Several stores searched as one, against one store with all documents."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest

from qwen_rerank import Reranker, TwoStageRetriever
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store import EmbedderMismatchError, FaissStore, ShardedFirstStage, StoreClosedError
from qwen_rerank.testing import HashEmbedder, OverlapScorer
from qwen_rerank.types import Document

WORDS = ["apple", "pear", "tree", "root", "ground", "red", "红", "苹果", "green"]
MODES = (None, "hybrid", "dense", "lexical")
EMBEDDER = HashEmbedder(16)


def random_documents(rng: random.Random, count: int) -> list[Document]:
    """Few words, so that equal texts and with them equal scores are common."""
    return [
        Document(f"d{i}", " ".join(rng.choices(WORDS, k=rng.randrange(4))), {"group": rng.randrange(3)})
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One store with all documents, and the same documents over four shards, some of them deleted again from both."""
    folder, rng = tmp_path_factory.mktemp("shards"), random.Random(3)
    documents = random_documents(rng, 700)
    parts = [documents[:300], documents[300:310], [], documents[310:]]
    gone = [document.id for document in rng.sample(documents, 60)]
    whole = FaissStore.create(folder / "whole", EMBEDDER)
    shards = [FaissStore.create(folder / f"shard-{i}", EMBEDDER) for i in range(len(parts))]
    for store, part in [(whole, documents), *zip(shards, parts, strict=True)]:
        store.add(part)
        store.delete(gone)
    yield whole, ShardedFirstStage(shards)
    for store in (whole, *shards):
        store.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_shards_find_what_one_store_finds(both, mode, seed):
    """The same documents, scores, ranks and order of ties, to the last bit: words are as common as in all shards together."""
    whole, shards = both
    rng = random.Random(seed)
    query = " ".join(rng.choices(WORDS, k=3))
    options = {"mode": mode, "filter": rng.choice([None, {"group": 1}, {"group": {"$in": [0, 2]}}, {"group": 9}])}
    for top_k in (9999,) if mode == "dense" else (400, 9999):  # so many that no half of the search is cut
        assert shards.search(query, top_k, **options) == whole.search(query, top_k, **options)
    for top_k in (1, 7) if mode in ("dense", "lexical") else ():
        found, expected = shards.search(query, top_k, **options), whole.search(query, top_k, **options)
        assert [hit.score for hit in found] == [hit.score for hit in expected]
        # Which of several equal ones are the last of a short result is FAISS's own choice.
        above = [hit for hit in expected if mode == "lexical" or hit.score > expected[-1].score]
        assert found[: len(above)] == above


def test_a_short_hybrid_result_is_that_of_one_store(tmp_path):
    """Both halves are cut at a depth of all shards together, not of each."""
    documents = [Document(f"d{i}", f"{WORDS[i % 5]} {WORDS[i % 7]} number{i}") for i in range(300)]
    with (
        FaissStore.create(tmp_path / "whole", EMBEDDER) as whole,
        FaissStore.create(tmp_path / "a", EMBEDDER) as a,
        FaissStore.create(tmp_path / "b", EMBEDDER) as b,
    ):
        whole.add(documents)
        a.add(documents[:130])
        b.add(documents[130:])
        for query in ("red apple", "root number7", "tree ground green"):
            assert ShardedFirstStage([a, b]).search(query, 10) == whole.search(query, 10)


def test_many_queries_weights_and_vectors_give_what_one_store_gives(both):
    whole, shards = both
    queries = ["red apple", "!", "root root", "苹果"]
    vectors = EMBEDDER.embed_queries(queries)
    options = {"weights": [1.0, 0.3], "vectors": vectors}

    assert shards.search_many(queries, 400, **options) == whole.search_many(queries, 400, **options)
    assert shards.search_many([]) == []
    assert len(shards) == len(whole) == 640


async def test_it_is_awaited_as_a_first_stage(both):
    whole, shards = both
    retriever = TwoStageRetriever(shards, Reranker(OverlapScorer()), top_k=5)

    found = await retriever.aretrieve("red apple")
    assert {hit.document.id for hit in found} == {hit.document.id for hit in whole.search("red apple", 5)}


def test_an_id_in_two_shards_is_found_once_where_it_scores_better(tmp_path):
    with FaissStore.create(tmp_path / "a", EMBEDDER) as a, FaissStore.create(tmp_path / "b", EMBEDDER) as b:
        a.add([Document("x", "pear tree"), Document("y", "green")])
        b.add([Document("x", "red apple"), Document("z", "red")])
        shards = ShardedFirstStage([a, b])

        found = shards.search("red apple", 9, mode="dense")
        assert [hit.rank for hit in found] == [1, 2, 3]
        assert found[0].document == Document("x", "red apple")
        assert len({hit.document.id for hit in shards.search("red apple", 9)}) == 3
        assert shards.repeated_ids() == ["x"]


def test_a_shard_that_fails_is_an_error_or_left_out_and_said(tmp_path, caplog):
    stores = [FaissStore.create(tmp_path / name, EMBEDDER) for name in "abc"]
    for store, text in zip(stores, ("red apple", "red pear", "red root"), strict=True):
        store.add([text])
    strict, lenient = ShardedFirstStage(stores), ShardedFirstStage(stores, on_failure="leave-out")
    stores[1].close()

    with pytest.raises(StoreClosedError) as caught:
        strict.search("red")
    assert str(stores[1].path) in "".join(caught.value.__notes__)
    assert sorted(hit.document.text for hit in lenient.search("red")) == ["red apple", "red root"]
    assert list(lenient.failures) == [stores[1].path]
    assert "is left out" in caplog.text
    for store in stores:
        store.close()
    with pytest.raises(StoreClosedError):
        lenient.search("red")


def test_a_wrong_argument_is_no_failure_of_a_shard(both):
    with pytest.raises(InvalidInputError, match="operator"):
        ShardedFirstStage(both[1].stores, on_failure="leave-out").search("red", filter={"group": {"$near": 1}})


def test_shards_that_cannot_be_compared_are_refused(tmp_path):
    with (
        FaissStore.create(tmp_path / "a", EMBEDDER) as a,
        FaissStore.create(tmp_path / "b", HashEmbedder(24)) as b,
        FaissStore.create(tmp_path / "c", EMBEDDER, metric="ip") as c,
        FaissStore.create(tmp_path / "d", EMBEDDER, words=False) as d,
    ):
        with pytest.raises(InvalidInputError, match="at least one open FaissStore"):
            ShardedFirstStage([])
        with pytest.raises(InvalidInputError, match="twice"):
            ShardedFirstStage([a, a])
        with pytest.raises(EmbedderMismatchError):
            ShardedFirstStage([a, b])
        with pytest.raises(InvalidInputError, match="build all shards alike"):
            ShardedFirstStage([a, c])
        with pytest.raises(InvalidInputError, match="build_words"):
            ShardedFirstStage([a, d]).search("red")
        assert ShardedFirstStage([a, d]).search("red", mode="dense") == []


def test_readers_are_pickled_and_go_on_while_a_shard_is_written(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with FaissStore.create(paths[0], EMBEDDER) as writer, FaissStore.create(paths[1], EMBEDDER):
        readers = ShardedFirstStage([FaissStore.open(path, EMBEDDER, read_only=True) for path in paths])
        again = pickle.loads(pickle.dumps(readers))
        writer.add(["red apple"])

        for each in (readers, again):
            assert [hit.document.text for hit in each.search("apple")] == ["red apple"]
            for store in each.stores:
                store.close()


def test_lists_of_many_queries_agree_within_rounding(both):
    """FAISS multiplies many queries at once by other kernels; the order of nearly equal scores is all that may differ."""
    whole, shards = both
    queries = [" ".join(random.Random(i).choices(WORDS, k=2)) for i in range(40)]

    for one, many in zip(whole.search_many(queries, 30, mode="dense"), shards.search_many(queries, 30, mode="dense")):
        np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in many], atol=1e-6)
