"""The disk fails: a typed error, the old state, and a handle that does not pretend."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_rerank.errors import StoreError
from qwen_rerank.store import CorruptStoreError, FaissStore, StoreFullError, StoreIOError, StoreLockedError
from qwen_rerank.types import Document
from tests.store.conftest import FRUIT


class Failing:
    """Stands in for a function of `os`: the n-th call and all after it fail, or only the n-th."""

    def __init__(self, real, when: int, code: int, *, once: bool) -> None:
        self.real, self.when, self.code, self.once, self.calls = real, when, code, once, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.when or (self.calls > self.when and not self.once):
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **options)


def contents(path, embedder):
    with FaissStore.open(path, embedder) as store:
        assert store.verify().ok
        return {document.id for document in store.get([document.id for document in FRUIT] + ["new"])}


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS, errno.EFBIG])
@pytest.mark.parametrize("name", ["fsync", "write", "replace", "open"])
def test_a_failing_call_leaves_the_old_or_the_new_commit(path, embedder, monkeypatch, name, code, once):
    with FaissStore.create(path, embedder) as store:
        store.add(FRUIT)
    real = getattr(os, name)
    for when in range(1, 10):
        with FaissStore.open(path, embedder) as store:
            failing = Failing(real, when, code, once=once)
            monkeypatch.setattr(os, name, failing)
            raised = False
            try:
                store.add([Document("new", "a new apple")])
            except StoreError:
                raised = True
            monkeypatch.setattr(os, name, real)
        found = contents(path, embedder)
        assert found - {"new"} == {document.id for document in FRUIT}
        assert raised or "new" in found
        if failing.calls < when:
            assert when > 1
            return
        with FaissStore.open(path, embedder) as store:
            store.delete(["new"])
    pytest.fail(f"os.{name} was called {failing.calls} times")


def test_a_failed_fsync_ends_the_handle(store, path, embedder, monkeypatch):
    """The kernel reports a lost write once; trying again would succeed and prove nothing."""
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, 1, errno.EIO, once=True))

    with pytest.raises(StoreIOError):
        store.add(["new"])
    for use in (lambda: store.add(["other"]), lambda: store.search("apple")):
        with pytest.raises(StoreIOError, match="open it again to go on"):
            use()

    store.close()
    assert len(contents(path, embedder)) == len(FRUIT)


def test_a_full_disk_costs_nothing_but_the_call(store):
    """SQLite's own limit stands for the disk's."""
    limit = store._database._connection.execute("PRAGMA page_count").fetchone()[0]
    store._database._connection.execute(f"PRAGMA max_page_count = {limit}")

    with pytest.raises(StoreFullError, match="Free some and try again"):
        store.add([Document("big", "x" * 1_000_000)])
    assert store.search("red apple", 1)[0].document.id == "apple"

    store._database._connection.execute("PRAGMA max_page_count = 1000000")
    store.add([Document("big", "x" * 1_000_000)])
    assert (len(store), store.verify().ok) == (5, True)


def test_no_space_for_the_commit_record_costs_nothing_but_the_call(store, monkeypatch):
    monkeypatch.setattr(os, "write", Failing(os.write, 1, errno.ENOSPC, once=True))

    with pytest.raises(StoreFullError):
        store.add([Document("new", "a new apple")])
    store.add([Document("new", "a new apple")])

    assert store.verify().ok


def test_a_faiss_file_that_cannot_be_written_is_not_missed(store, path, embedder, monkeypatch, caplog):
    import faiss

    def refuse(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(faiss, "write_index", refuse)
    with pytest.raises(StoreIOError, match="No space left"):
        store.save()
    again = FaissStore.open(path, embedder, read_only=True)
    store.close()

    assert not list(path.glob("index-*"))
    assert len(again.search("apple")) == len(FRUIT)
    again.close()


def test_close_goes_on_when_the_faiss_file_cannot_be_written(path, embedder, monkeypatch, caplog):
    import faiss

    store = FaissStore.create(path, embedder)
    store.add(FRUIT)
    monkeypatch.setattr(faiss, "write_index", lambda *_: (_ for _ in ()).throw(RuntimeError("No space left")))
    store.close()

    assert "the next open catches up" in caplog.text
    assert len(contents(path, embedder)) == len(FRUIT)


def test_a_writer_that_waits_too_long_for_readers_can_try_again(store, path, monkeypatch):
    import sqlite3

    store._database._connection.execute("PRAGMA busy_timeout = 20")
    reader = sqlite3.connect(path / "documents.sqlite3")
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM documents").fetchone()

    with pytest.raises(StoreLockedError):
        store.add([Document("new", "a new apple")])
    reader.close()
    store.add([Document("new", "a new apple")])

    assert (len(store), store.verify().ok) == (5, True)


def test_an_interrupted_commit_ends_the_handle(store, path, embedder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.add([Document("new", "a new apple")])
    monkeypatch.undo()

    with pytest.raises(StoreIOError, match="a commit was interrupted"):
        store.search("apple")
    store.close()
    assert "new" in contents(path, embedder)


@pytest.mark.parametrize("name", ["commit.json", "index", "words"])
def test_a_pipe_in_place_of_a_file_does_not_block(store, path, embedder, name):
    store.close()
    file = next(path.glob(f"{name}*"))
    file.unlink()
    os.mkfifo(file)

    if name == "commit.json":
        with pytest.raises(CorruptStoreError, match="no regular file"):
            FaissStore.open(path, embedder)
    else:
        with FaissStore.open(path, embedder) as again:
            assert (again.verify().ok, again.search("red apple", 1)[0].document.id) == (True, "apple")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOLCK])
def test_a_lock_that_cannot_be_taken_is_a_store_error(store, path, embedder, monkeypatch, code):
    store.close()
    monkeypatch.setattr("fcntl.flock", Failing(fcntl.flock, 1, code, once=True))

    with pytest.raises(StoreIOError, match=r"writer\.lock"):
        FaissStore.open(path, embedder)


def limited(path: Path, kind: int, value: int, step: str) -> subprocess.CompletedProcess[str]:
    """Run a step on a store in a process with a resource limit."""
    code = f"""
import resource, signal, sys
import faiss
from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = FaissStore.open(sys.argv[1], HashEmbedder(32))
resource.setrlimit({kind}, ({value}, {value}))
{step}
"""
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("size", [0, 100, 5_000, 40_000, 60_000])
def test_a_limit_on_file_sizes_is_a_typed_error(store, path, embedder, size):
    store.close()

    done = limited(path, resource.RLIMIT_FSIZE, size, "store.add([Document('new', 'x' * 500_000)])")

    assert "qwen_rerank.store.errors." in done.stderr
    assert contents(path, embedder) == {document.id for document in FRUIT}


def test_no_file_descriptors_is_a_typed_error(store, path, embedder):
    store.close()

    done = limited(path, resource.RLIMIT_NOFILE, 3, "store.add([Document('new', 'x')])")

    assert "qwen_rerank.store.errors.StoreIOError" in done.stderr
    assert contents(path, embedder) == {document.id for document in FRUIT}


def mounted(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own; skip where that is not allowed."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = ["unshare", "-rm", "sh", "-euc", script, "sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


READ_ONLY = """
import sys
from qwen_rerank.store import FaissStore, StoreReadOnlyError
from qwen_rerank.testing import HashEmbedder
try:
    FaissStore.open(sys.argv[1], HashEmbedder(32))
except StoreReadOnlyError as error:
    print(error)
with FaissStore.open(sys.argv[1], HashEmbedder(32), read_only=True) as store:
    print(len(store.search("apple")), store.verify().ok)
"""


def test_a_read_only_file_system_can_be_read(store, path):
    store.close()

    done = mounted(
        'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; exec "$2" -c "$3" "$1"',
        str(path),
        sys.executable,
        READ_ONLY,
    )

    assert done.stderr == ""
    assert "open the store with read_only=True" in done.stdout
    assert done.stdout.endswith("4 True\n")


NO_INODES = """
import os, sys
from qwen_rerank.store import FaissStore, StoreFullError
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document
store = FaissStore.create(sys.argv[1] + "/store", HashEmbedder(32))
store.add([Document("a", "apple")])
ballast, n = sys.argv[1] + "/ballast", 0
try:
    while True:
        open(f"{ballast}{n}", "w").close()
        n += 1
except OSError:
    pass
for attempt in range(2):
    try:
        store.add([Document("b", "pear")])
    except StoreFullError:
        print("full", [hit.document.id for hit in store.search("apple")])
    for i in range(n):
        os.remove(f"{ballast}{i}")
    n = 0
print(len(store), store.verify().ok)
"""


def test_no_inode_is_a_full_disk(tmp_path):
    done = mounted(
        'mount -t tmpfs -o size=8m,nr_inodes=20 none "$1"; exec "$2" -c "$3" "$1"',
        str(tmp_path),
        sys.executable,
        NO_INODES,
    )

    assert done.stdout == "full ['a']\n2 True\n", done.stderr


FULL = """
import os, sys
from qwen_rerank.store import FaissStore, StoreFullError
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document
ballast = sys.argv[1] + "/ballast"
with open(ballast, "wb") as file:
    file.write(bytes(100_000))
store = FaissStore.create(sys.argv[1] + "/store", HashEmbedder(32))
n = 0
try:
    while n < 10_000:
        store.add([Document(str(n), "apple " * 200)])
        n += 1
except StoreFullError:
    assert len(store.search("apple", 10_000)) == len(store) == n, (len(store), n)
    os.remove(ballast)
    store.delete([str(n - 1)])
    store.add([Document("more", "apple again")])
    assert len(store) == n
    store.close()
    with FaissStore.open(sys.argv[1] + "/store", HashEmbedder(32), read_only=True) as again:
        print("full", again.verify().ok)
"""


def test_a_disk_that_fills_up_keeps_what_it_has(tmp_path, full):
    for size_kib in range(208, 4096, 16) if full else (208, 1000):
        done = mounted(
            f'mount -t tmpfs -o size={size_kib}k none "$1"; exec "$2" -c "$3" "$1"', str(tmp_path), sys.executable, FULL
        )

        assert done.stdout == "full True\n", (size_kib, done.stderr)
