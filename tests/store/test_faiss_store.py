"""What a user of FaissStore relies on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen_rerank import FaissStore, FirstStage
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store import (
    CorruptStoreError,
    DuplicateIdError,
    EmbedderMismatchError,
    FormatTooNewError,
    NotAStoreError,
    StoreClosedError,
    StoreExistsError,
    StoreNotFoundError,
    StoreReadOnlyError,
)
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document
from tests.store.conftest import FRUIT


def ids(candidates):
    return [candidate.document.id for candidate in candidates]


# Searching


def test_a_store_is_a_first_stage(store):
    assert isinstance(store, FirstStage)


def test_search_gives_cosines_best_first_with_ranks_from_1(store, embedder):
    query = embedder.embed_queries(["red apple"])[0]

    found = store.search("red apple", top_k=2, mode="dense")

    assert [(hit.rank, hit.score_kind) for hit in found] == [(1, "cosine"), (2, "cosine")]
    assert found[0].document == FRUIT[0]
    for hit in found:
        assert hit.score == pytest.approx(float(query @ embedder.embed_documents([hit.document.text])[0]), abs=1e-6)


def test_search_finds_chinese(store):
    assert ids(store.search("红苹果", 1)) == ["苹果"]


def test_equal_scores_come_in_the_order_of_arrival(store):
    store.add([Document(f"twin-{i}", "twin words") for i in (3, 1, 2)])

    assert ids(store.search("twin words", 2)) == ["twin-3", "twin-1"]


@pytest.mark.parametrize("top_k", [0, -1, True, "3", 2.0, None])
def test_a_bad_top_k_is_a_value_error(store, top_k):
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1"):
        store.search("apple", top_k)


def test_top_k_above_the_count_gives_all(store):
    assert sorted(ids(store.search("apple", 10**9))) == sorted(document.id for document in FRUIT)


@pytest.mark.parametrize("query", ["", "  ", "\ud800", 3])
def test_a_query_without_text_is_refused(store, query):
    with pytest.raises(InvalidInputError, match="query"):
        store.search(query)


def test_a_query_without_tokens_finds_nothing(store):
    assert store.search("?!") == []


def test_an_empty_store_finds_nothing(path, embedder):
    with FaissStore.create(path, embedder) as store:
        assert (len(store), store.search("apple"), store.get(["a"])) == (0, [], [])


def test_search_vectors_answers_each_row_as_search_does(store, embedder):
    queries = ["red apple", "orange carrot"]

    found = store.search_vectors(embedder.embed_queries(queries), 3)

    assert found == [store.search(query, 3, mode="dense") for query in queries]


def test_inner_product_keeps_vectors_as_they_are(path):
    with FaissStore.create(path, HashEmbedder(2), metric="ip") as store:
        store.add(["long", "short"], vectors=np.array([[3, 0], [1, 0]]))

        assert [hit.score for hit in store.search_vectors(np.array([[2.0, 0.0]]))[0]] == [6.0, 2.0]


# Filters


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({}, {"apple", "pear", "carrot", "苹果"}),
        ({"kind": "fruit"}, {"apple", "pear"}),
        ({"kind": "水果"}, {"苹果"}),
        ({"kind": "fruit", "year": 2020}, {"apple"}),
        ({"year": 2020.0}, {"apple", "carrot"}),
        ({"fresh": True}, {"apple"}),
        ({"fresh": 1}, set()),
        ({"fresh": None}, {"carrot"}),
        ({"kind": "Fruit"}, set()),
        ({"tags": "a"}, set()),
        ({"no such key": "x"}, set()),
        ({'"; DROP TABLE documents; --': 1}, set()),
    ],
)
def test_a_filter_keeps_documents_with_equal_metadata(store, filter, expected):
    assert set(ids(store.search("grows", filter=filter))) == expected


def test_a_filtered_search_still_gives_top_k(path, embedder):
    with FaissStore.create(path, embedder) as store:
        store.add([Document(str(i), f"red apple {i}", {"rare": i >= 990}) for i in range(1000)])

        assert len(store.search("apple 5", 10, filter={"rare": True})) == 10


@pytest.mark.parametrize(
    "filter", ["kind", {"kind": ["fruit"]}, {3: "x"}, {"year": 2**70}, {"year": math.nan}, {"a": b"x"}]
)
def test_a_filter_that_cannot_be_is_refused(store, filter):
    with pytest.raises(InvalidInputError, match="filter"):
        store.search("apple", filter=filter)


# Writing


def test_documents_come_back_after_reopening(store, path, embedder):
    store.close()

    with FaissStore.open(path, embedder) as again:
        assert again.get([document.id for document in FRUIT]) == FRUIT
        assert ids(again.search("red apple", 1)) == ["apple"]
        assert again.verify().ok


def test_get_keeps_the_order_of_ids_and_leaves_unknown_ones_out(store):
    assert [document.id for document in store.get(["pear", "nobody", "apple", "pear"])] == ["pear", "apple", "pear"]


def test_strings_are_documents_too(store):
    (one,) = store.add(["a purple plum"])

    assert store.get([one]) == [Document.from_text("a purple plum")]


@pytest.mark.parametrize("batch", [["x", "x"], [FRUIT[0]], ["new", FRUIT[1]]])
def test_add_refuses_ids_that_are_there_and_stores_nothing(store, batch):
    with pytest.raises(DuplicateIdError, match="use upsert"):
        store.add(batch)

    assert len(store) == len(FRUIT)


def test_upsert_replaces_and_the_last_of_equal_ids_counts(store):
    store.upsert([Document("apple", "first"), Document("new", "newer"), Document("apple", "second")])

    assert [document.text for document in store.get(["apple", "new"])] == ["second", "newer"]
    assert (len(store), ids(store.search("second", 1))) == (5, ["apple"])


def test_delete_says_what_was_not_there(store):
    report = store.delete(["apple", "nobody", "apple"])

    assert (report.deleted, report.not_found) == (1, ("nobody",))
    assert "apple" not in ids(store.search("red apple"))


def test_all_documents_can_be_deleted_and_added_again(store, path, embedder):
    store.delete([document.id for document in FRUIT])
    assert (len(store), store.search("apple")) == (0, [])
    store.add(FRUIT)
    store.close()

    with FaissStore.open(path, embedder) as again:
        assert len(again.search("apple")) == len(FRUIT)


@pytest.mark.parametrize("call", ["add", "upsert", "delete"])
def test_nothing_to_do_is_fine(store, call):
    before = (store.path / "commit.json").read_bytes()

    getattr(store, call)([])

    assert (store.path / "commit.json").read_bytes() == before


def test_text_without_tokens_is_stored_counted_and_never_found(store):
    store.add([Document("empty", ""), Document("marks", "?!")])

    assert store.without_vector == 2
    assert [document.text for document in store.get(["empty", "marks"])] == ["", "?!"]
    assert not {"empty", "marks"} & set(ids(store.search("apple")))


def test_an_embedder_that_fails_midway_leaves_nothing(store, monkeypatch):
    real = HashEmbedder.embed_documents
    monkeypatch.setattr(
        HashEmbedder, "embed_documents", lambda self, texts: real(self, texts[:5]) / 0 if len(texts) < 9 else _fail()
    )

    with pytest.raises(RuntimeError, match="out of power"):
        store.add([f"text {i}" for i in range(10)])

    assert len(store) == len(FRUIT)


def _fail():
    raise RuntimeError("out of power")


# Creating, opening, closing


def test_create_never_opens(store, path, embedder):
    with pytest.raises(StoreExistsError, match="open it with FaissStore"):
        FaissStore.create(path, embedder)


def test_create_takes_an_empty_folder_and_makes_parents(tmp_path, embedder):
    (tmp_path / "empty").mkdir()

    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c", tmp_path / ("n" * 255)):
        FaissStore.create(path, embedder).close()
        assert sorted(p.name for p in path.iterdir()) == [
            "commit.json",
            "documents.sqlite3",
            "seal.json",
            "writer.lock",
        ]
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "a", "n" * 255}


def test_create_refuses_a_folder_of_other_things(tmp_path, embedder):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(StoreExistsError):
        FaissStore.create(tmp_path, embedder)
    with pytest.raises(StoreExistsError):
        FaissStore.create(tmp_path / "notes.txt", embedder)


@pytest.mark.parametrize(
    "argument",
    [{"index": "IVF16"}, {"vectors": "int8"}, {"index": 3}, {"index": "HNSW2"}, {"metric": "l2"}, {"device": "tpu"}],
)
def test_create_refuses_what_it_does_not_know(path, embedder, argument):
    with pytest.raises(InvalidInputError, match=next(iter(argument))):
        FaissStore.create(path, embedder, **argument)
    assert not path.exists()


@pytest.mark.parametrize("path", ["", "a\0b", 3, b"x"])
def test_a_path_that_cannot_be_is_refused(path, embedder):
    with pytest.raises(InvalidInputError, match="path"):
        FaissStore.open(path, embedder)


@pytest.mark.parametrize("embedder", ["pocket", 3, object()])
def test_what_is_no_embedder_is_refused(path, embedder):
    with pytest.raises(InvalidInputError, match="load_embedder"):
        FaissStore.create(path, embedder)


def test_open_never_creates(path, tmp_path, embedder):
    with pytest.raises(StoreNotFoundError, match="make one with"):
        FaissStore.open(path, embedder)
    with pytest.raises(StoreNotFoundError):
        FaissStore.open(tmp_path, embedder)
    assert not path.exists()


def test_open_refuses_what_is_no_store(tmp_path, embedder):
    (tmp_path / "notes.txt").write_text("mine")

    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(NotAStoreError, match="is not a store"):
            FaissStore.open(path, embedder)


def test_open_refuses_a_newer_format(store, path, embedder):
    from qwen_rerank.store.commits import CommitRecord

    store.close()
    newer = CommitRecord(store="0" * 32, commit=0, chain="0" * 64, format=3)
    newer.acknowledge(path, newer.prepare(path))

    with pytest.raises(FormatTooNewError, match="upgrade") as caught:
        FaissStore.open(path, embedder)
    assert (caught.value.found, caught.value.supported) == (3, 2)


@pytest.mark.parametrize("dim", [31, 33])
def test_open_refuses_another_embedder(store, path, dim):
    store.close()

    with pytest.raises(EmbedderMismatchError, match="create a new store") as caught:
        FaissStore.open(path, HashEmbedder(dim))
    assert (caught.value.stored, caught.value.given) == ("hash-32 (32 dimensions)", f"hash-{dim} ({dim} dimensions)")


def test_a_closed_store_says_so_and_closes_twice(store):
    store.close()
    store.close()

    for use in (lambda: store.search("a"), lambda: store.add(["a"]), lambda: len(store), store.verify):
        with pytest.raises(StoreClosedError, match="was closed"):
            use()


def test_a_read_only_store_refuses_to_write(store, path, embedder):
    with FaissStore.open(path, embedder, read_only=True) as reader:
        for write in (
            lambda: reader.add(["a"]),
            lambda: reader.upsert(["a"]),
            lambda: reader.delete(["a"]),
            reader.compact,
            reader.save,
        ):
            with pytest.raises(StoreReadOnlyError, match="read_only=True"):
                write()
        assert ids(reader.search("red apple", 1)) == ["apple"]


@pytest.mark.parametrize("name", ["documents.sqlite3", "commit.json", "writer.lock", "documents.sqlite3-journal"])
def test_a_symbolic_link_in_place_of_a_file_is_refused(store, path, tmp_path, embedder, name):
    store.close()
    if (path / name).exists():
        (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)

    with pytest.raises(CorruptStoreError, match="symbolic link"):
        FaissStore.open(path, embedder)


def test_a_link_to_the_folder_is_followed(store, path, tmp_path, embedder):
    store.close()
    (tmp_path / "link").symlink_to(path)

    with FaissStore.open(tmp_path / "link", embedder) as linked:
        assert len(linked) == len(FRUIT)


def test_no_order_depends_on_the_clock(store, monkeypatch):
    monkeypatch.setattr("time.time", lambda: -1e9)
    store.add(["later"])

    assert store.verify().ok
