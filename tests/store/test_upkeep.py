"""What users of a store expect beside searching: making it anew or not, changing, deleting, copying, counting."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from qwen_rerank import Document, FaissStore
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store import (
    CorruptStoreError,
    EmbedderMismatchError,
    NotAStoreError,
    StoreExistsError,
    StoreFullError,
    StoreLockedError,
    StoreNotFoundError,
)
from qwen_rerank.testing import HashEmbedder
from tests.store.conftest import FRUIT
from tests.store.test_faults import mounted


def ids(found):
    return [getattr(one, "document", one).id for one in found]


# Making


def test_open_or_create_makes_a_store_once(path, embedder):
    for n in range(3):
        with FaissStore.open_or_create(path, embedder, indexed_fields=["kind"]) as store:
            assert len(store) == n
            store.add([f"apple {n}"])


def test_open_or_create_refuses_what_is_no_store_and_other_embedders(store, path, tmp_path):
    store.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")

    with pytest.raises(EmbedderMismatchError):
        FaissStore.open_or_create(path, HashEmbedder(7))
    with pytest.raises(NotAStoreError):
        FaissStore.open_or_create(tmp_path / "other", HashEmbedder(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosine"}, "metric='cosine', but the store .* was made with 'ip'"),
        ({"words": False}, "words=False, but .* True"),
        ({"vectors": "float16"}, "vectors='float16', but .* 'float32'"),
        ({"index": "HNSW16"}, "index='HNSW16', but .* 'HNSW32'"),
        ({"metric": "nonsense"}, "metric must be one of"),
        ({"metrics": "ip"}, "no option 'metrics'"),
    ],
)
def test_an_option_that_a_store_was_not_made_with_is_refused(path, embedder, options, message):
    FaissStore.open_or_create(path, embedder, metric="ip", index="HNSW32,Flat").close()

    with pytest.raises(InvalidInputError, match=message):
        FaissStore.open_or_create(path, embedder, **options)
    FaissStore.open_or_create(path, embedder, metric="ip", index="HNSW32,Flat", indexed_fields=["year"]).close()
    FaissStore.open_or_create(path, embedder, index="auto", words=True, vectors="float32").close()


def test_a_mount_point_becomes_a_store(tmp_path):
    script = 'mount -t tmpfs none "$1"; mkdir "$1/lost+found"; exec "$2" -c "$3" "$1"'
    code = (
        "import sys\nfrom qwen_rerank import FaissStore\nfrom qwen_rerank.testing import HashEmbedder\n"
        "with FaissStore.create(sys.argv[1], HashEmbedder(8)) as store: store.add(['apple'])\n"
        "with FaissStore.open(sys.argv[1], HashEmbedder(8)) as store: print(len(store), store.verify().ok)"
    )
    import sys

    done = mounted(script, str(tmp_path), sys.executable, code)

    assert (done.stdout, done.stderr) == ("1 True\n", "")


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("name", ["fsync", "write", "rename", "replace", "mkdir", "open"])
def test_create_on_a_full_disk_says_so_every_time_and_leaves_nothing(tmp_path, embedder, monkeypatch, name, existed):
    """Whichever call finds the disk full: the next `create` meets the same, not a store that nobody was given."""
    path, real = tmp_path / "store", getattr(os, name)
    if existed:
        path.mkdir()
    for when in range(1, 40):
        calls = iter(range(1, 10_000))

        def failing(*args, calls=calls, when=when, **options):
            # Opening to read takes no space.
            if (name != "open" or args[1] & os.O_CREAT) and next(calls) == when:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        monkeypatch.setattr(os, name, failing)
        try:
            FaissStore.create(path, embedder).close()
        except StoreFullError:
            monkeypatch.undo()
            assert not path.exists() or {one.name for one in path.iterdir()} <= {"writer.lock"}
            continue
        monkeypatch.undo()
        assert FaissStore.open(path, embedder).verify().ok
        return
    pytest.fail(f"os.{name} never succeeded")


@pytest.mark.parametrize("moved", [0, 1])
def test_a_creation_that_was_killed_is_made_anew(tmp_path, embedder, moved):
    path = tmp_path / "store"
    FaissStore.create(path, embedder).close()
    making = path / ".0123456789abcdef.making"
    making.mkdir()
    for name in ("commit.json", "documents.sqlite3")[: 2 - moved]:
        (path / name).rename(making / name)
    (path / "seal.json").unlink()  # made when a finished store is opened

    with pytest.raises(StoreNotFoundError):
        FaissStore.open(path, embedder)
    with FaissStore.create(path, embedder) as store:
        store.add(["apple"])
    assert sorted(one.name for one in path.iterdir() if not one.name.startswith(("index", "words"))) == [
        "commit.json",
        "documents.sqlite3",
        "seal.json",
        "writer.lock",
    ]


def test_a_store_whose_commit_record_is_gone_is_not_made_anew(store, path, embedder):
    store.close()
    (path / "commit.json").unlink()

    with pytest.raises(StoreExistsError):
        FaissStore.create(path, embedder)
    with pytest.raises(CorruptStoreError):
        FaissStore.open_or_create(path, embedder)


def test_two_creations_in_one_folder_do_not_mix(tmp_path, embedder, monkeypatch):
    path = tmp_path / "store"
    path.mkdir()
    real = os.rename

    def second(*args):
        monkeypatch.undo()
        with pytest.raises(StoreLockedError):
            FaissStore.create(path, embedder)
        real(*args)

    monkeypatch.setattr(os, "rename", second)
    with FaissStore.create(path, embedder) as store:
        assert store.verify().ok


# Changing


def test_metadata_changes_without_embedding_again(store, path, embedder, monkeypatch):
    query = embedder.embed_queries(["red apple"])
    before = store.search_vectors(query, 9)[0]
    monkeypatch.setattr(HashEmbedder, "embed_documents", lambda *_: pytest.fail("embedded again"))

    assert store.update_metadata({"apple": {"year": 2030, "new": [1]}, "nobody": {"a": 1}}) == ["nobody"]

    assert store.get(["apple"])[0].metadata == {"kind": "fruit", "year": 2030, "fresh": True, "new": [1]}
    assert [(h.document.id, h.score) for h in store.search_vectors(query, 9)[0]] == [
        (h.document.id, h.score) for h in before
    ]
    assert ids(store.search("grows", 9, mode="lexical", filter={"year": {"$gt": 2021}})) == ["apple"]
    assert store.verify().ok


def test_metadata_of_texts_without_a_vector_changes_too(store):
    store.add([Document("marks", "?!")])
    store.update_metadata({"marks": {"a": 1}, "pear": {"a": 2}, "apple": {"a": 3}})

    assert [document.metadata["a"] for document in store.get(["marks", "pear", "apple"])] == [1, 2, 3]
    assert (store.without_vector, store.verify().ok) == (1, True)
    assert ids(store.search("red apple", 1, mode="dense")) == ["apple"]


@pytest.mark.parametrize("changes", [["apple"], {"apple": 3}, {"": {}}, {"apple": {"a": object()}}])
def test_changes_that_cannot_be_are_refused(store, changes):
    with pytest.raises(InvalidInputError):
        store.update_metadata(changes)
    assert store.get(["apple"]) == [FRUIT[0]]


def test_delete_by_filter(store):
    assert store.delete(filter={"year": {"$lte": 2020}}).deleted == 2
    assert sorted(document.id for document in store) == ["pear", "苹果"]
    assert store.delete(filter={"year": 1}).deleted == 0


@pytest.mark.parametrize(
    "arguments", [{}, {"ids": ["a"], "filter": {"a": 1}}, {"filter": {}}, {"filter": {"$and": [{}, {"$not": {}}]}}]
)
def test_delete_needs_ids_or_a_filter(store, arguments):
    with pytest.raises(InvalidInputError, match="delete needs ids or a filter"):
        store.delete(**arguments)
    assert len(store) == len(FRUIT)


# Copying and counting


@pytest.mark.parametrize("read_only", [False, True])
def test_a_backup_of_an_open_store_is_a_store(store, path, tmp_path, embedder, read_only):
    store.save()
    store.add(["later"])
    source = FaissStore.open(path, embedder, read_only=True) if read_only else store
    source.backup(tmp_path / "copy")
    store.delete(["apple"])

    with FaissStore.open(tmp_path / "copy", embedder) as copy:
        assert (len(copy), copy.verify().ok) == (5, True)
        assert ids(copy.search("red apple", 1)) == ["apple"]
    with pytest.raises(StoreExistsError):
        store.backup(tmp_path / "copy")


def test_a_backup_that_fails_leaves_nothing(store, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreFullError):
        store.backup(tmp_path / "copy")

    assert not (tmp_path / "copy").exists()
    store.add(["goes on"])


def test_iteration_gives_every_document_in_order_of_arrival(path, embedder):
    with FaissStore.create(path, None) as store:
        store.add([Document(str(n), f"text {n}") for n in range(2500)])
        store.upsert([Document("7", "again")])

        assert ids(store) == [str(n) for n in range(2500) if n != 7] + ["7"]


def test_statistics(store):
    store.add([Document("marks", "?!")])
    store.declare(["year"])
    found = store.statistics()

    assert (found.documents, found.without_vector, found.commits) == (5, 1, 3)
    assert (found.fingerprint, found.dim, found.metric, found.index) == ("hash-32", 32, "cosine", "auto")
    assert (found.words, found.indexed_fields) == (True, ("year",))
    assert found.file_bytes["documents.sqlite3"] > 0
