"""The seal makes opening quick, never less strict."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_rerank.store import CorruptStoreError, FaissStore, verify_store
from qwen_rerank.store.database import Database
from qwen_rerank.store.seal import SEAL_FILE
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document
from tests.store.worker import apply, apply_to_model, random_operation

EMBEDDER = HashEmbedder(16)


@pytest.fixture
def checked(monkeypatch) -> list[Path]:
    """The databases whose rows were all read to be checked."""
    seen: list[Path] = []
    real = Database.read_commit
    monkeypatch.setattr(Database, "read_commit", lambda self: seen.append(self.path) or real(self))
    return seen


def contents(path: Path) -> dict[str, str]:
    with FaissStore.open(path, EMBEDDER, read_only=True) as store:
        assert store.verify().ok
        return {document.id: document.text for document in store}


@pytest.mark.parametrize("seed", range(3))
def test_the_seal_fits_after_every_call_that_writes(tmp_path, checked, seed, full):
    """Even if the process is killed then."""
    path, model, rng = tmp_path / "store", {}, random.Random(seed)
    store = FaissStore.create(path, EMBEDDER)
    for step in range(500 if full else 40):
        operation = random_operation(rng, seed, step)
        store = apply(store, operation)
        model = apply_to_model(model, operation)
        copy = Path(shutil.copytree(path, tmp_path / "copy"))
        checked.clear()
        FaissStore.open(copy, EMBEDDER, read_only=True).close()
        assert checked == [], operation
        assert contents(copy) == model
        shutil.rmtree(copy)
    store.close()


def test_the_seal_fits_after_a_commit_larger_than_the_cache(tmp_path, checked):
    path = tmp_path / "store"
    with FaissStore.create(path, EMBEDDER) as store:
        store.add([Document(f"{n}", f"apple {n} " * 50) for n in range(300)])
        store._database._connection.execute("PRAGMA cache_size = 10")
        store.delete([f"{n}" for n in range(0, 300, 2)])
        store.upsert([Document(f"{n}", f"pear {n} " * 60) for n in range(100, 400)])
    checked.clear()

    FaissStore.open(path, EMBEDDER).close()

    assert checked == []


@pytest.mark.parametrize("seal", [None, b"", b"{}", b"\x00" * 1024, "of the commit before", "of another store"])
def test_without_a_seal_that_fits_every_row_is_checked_and_a_new_one_made(tmp_path, checked, seal):
    path, file = tmp_path / "store", tmp_path / "store" / SEAL_FILE
    with FaissStore.create(path, EMBEDDER) as store:
        store.add(["a red apple"])
        before = file.read_bytes()
        store.add(["a green pear"])
    FaissStore.create(tmp_path / "other", EMBEDDER).close()
    others = {"of the commit before": before, "of another store": (tmp_path / "other" / SEAL_FILE).read_bytes()}
    file.unlink()
    if seal is not None:
        file.write_bytes(others.get(seal, seal))

    read = []
    for read_only in (True, False, False):  # a reader, a writer that makes a new one, and one that finds it
        checked.clear()
        FaissStore.open(path, EMBEDDER, read_only=read_only).close()
        read.append(len(checked))

    assert read == [1, 1, 0]
    assert sorted(contents(path).values()) == ["a green pear", "a red apple"]


def test_a_row_that_was_damaged_before_other_commits_gets_no_seal(tmp_path):
    """The writer digests the pages that it wrote, not those that somebody else did."""
    path = tmp_path / "store"
    with FaissStore.create(path, EMBEDDER) as store:
        store.add([Document(f"{n}", f"apple {n} " * 200) for n in range(100)])
        file = path / "documents.sqlite3"
        data = bytearray(file.read_bytes())
        data[data.index(b"apple 40 ")] ^= 1
        file.write_bytes(data)
        store.add(["another"])

    with pytest.raises(CorruptStoreError, match="does not match its digest"):
        FaissStore.open(path, EMBEDDER)


def test_compact_seals_nothing_that_it_has_not_checked(tmp_path):
    path = tmp_path / "store"
    store = FaissStore.create(path, EMBEDDER)
    store.add([Document(f"{n}", f"apple {n}") for n in range(20)])
    other = sqlite3.connect(path / "documents.sqlite3")
    other.execute("UPDATE documents SET metadata = '{\"n\":1}' WHERE id = '3'")
    other.commit()
    other.close()

    with pytest.raises(CorruptStoreError, match="does not match its digest"):
        store.compact()
    store.close()
    assert not verify_store(path).ok


def test_a_seal_that_cannot_be_written_costs_nothing_but_time(tmp_path, checked, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "store"
    store = FaissStore.create(path, EMBEDDER)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        store.add(["a red apple"])
        store.close()
    checked.clear()

    assert list(contents(path).values()) == ["a red apple"]
    assert checked != []


TRY_TO_WRITE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
try:
    connection.execute("BEGIN IMMEDIATE")
    print("written")
except sqlite3.OperationalError as error:
    print(error)
"""


def test_digesting_pages_leaves_the_locks_of_the_process_alone(tmp_path):
    """POSIX drops all locks of a process on a file when it closes any descriptor of it."""
    path = tmp_path / "store"
    with FaissStore.create(path, EMBEDDER) as store, store._database.transaction():
        FaissStore.open(path, EMBEDDER, read_only=True).close()
        done = subprocess.run(
            [sys.executable, "-c", TRY_TO_WRITE, str(path / "documents.sqlite3")], capture_output=True, text=True
        )

    assert done.stdout == "database is locked\n"


def test_the_descriptor_is_closed_with_the_last_handle(tmp_path):
    from qwen_rerank.store.seal import _shared

    path = tmp_path / "store"
    before = len(_shared)
    store = FaissStore.create(path, EMBEDDER)
    readers = [FaissStore.open(path, EMBEDDER, read_only=True) for _ in range(3)]
    assert len(_shared) == before + 1
    for one in (store, *readers):
        one.close()
    assert len(_shared) == before
