"""Processes, threads and forks around one store."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwen_rerank.store import CorruptStoreError, EmbedderMismatchError, FaissStore, ForkedHandleError, StoreLockedError
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

HOLD = """
import sys, time
from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
store = FaissStore.open(sys.argv[1], HashEmbedder(32))
print("open", flush=True)
time.sleep(60)
"""


def test_the_second_writer_learns_who_holds_the_store(store, path, embedder):
    with pytest.raises(StoreLockedError, match=rf"process {os.getpid()}.*read_only=True") as caught:
        FaissStore.open(path, embedder)

    assert caught.value.pid == os.getpid()
    store.add(["the first is unaffected"])


def test_a_killed_writer_lets_the_next_one_in(store, path, embedder):
    store.close()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(StoreLockedError) as caught:
            FaissStore.open(path, embedder)
        assert caught.value.pid == holder.pid
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()

    FaissStore.open(path, embedder).close()


def test_a_failed_open_leaves_no_lock(store, path, embedder):
    store.close()

    for _ in range(2):
        with pytest.raises(EmbedderMismatchError):
            FaissStore.open(path, HashEmbedder(31))
    FaissStore.open(path, embedder).close()


def test_a_reader_sees_what_a_writer_did_since(store, path, embedder):
    with FaissStore.open(path, embedder, read_only=True) as reader:
        store.add([Document("plum", "a purple plum")])
        store.delete(["apple"])
        store.upsert([Document("pear", "a purple pear")])

        assert {hit.document.id for hit in reader.search("purple", 2)} == {"plum", "pear"}
        assert reader.get(["apple"]) == []
        assert (len(reader), reader.verify().ok) == (4, True)


def test_every_read_beside_a_writer_is_one_commit(path, embedder, full):
    """Each commit moves one document to a new text; a mixture of two commits would miss it or show it twice."""
    commits = 1000 if full else 150
    with FaissStore.create(path, embedder) as store:
        store.add([Document("moving", "apple round 0")] + [Document(f"d{i}", f"filler {i} apple") for i in range(20)])
        stop = threading.Event()
        reads = []

        def read() -> None:
            with FaissStore.open(path, embedder, read_only=True) as reader:
                while not stop.is_set():
                    found = reader.search("apple round", 99)
                    texts = [hit.document.text for hit in found if hit.document.id == "moving"]
                    assert len(texts) == 1
                    assert len(found) == 21
                    reads.append(int(texts[0].split()[-1]))
                    time.sleep(0.002)

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            n = 0
            # On a busy machine the reader may need longer than the commits do.
            while not reading.done() and (n < commits or len(set(reads)) < 10):
                n += 1
                store.upsert([Document("moving", f"apple round {n}")])
                if n % 40 == 0:
                    store.compact()
            stop.set()
            reading.result()
    assert reads == sorted(reads)
    assert len(set(reads)) >= 10


def test_a_reader_outlives_the_files_it_was_opened_with(store, path, embedder):
    store.save()
    with FaissStore.open(path, embedder, read_only=True) as reader:
        for i in range(3):
            store.add([f"plum {i}"])
            store.compact()
        assert len(reader.search("plum", 99)) == 7


def searches(handle):
    return [
        handle.search("red apple", 9, mode=mode, filter={"kind": "fruit"}) for mode in ("dense", "lexical", "hybrid")
    ]


def test_a_search_does_not_wait_for_the_commit_of_its_own_handle(store, monkeypatch):
    before = searches(store)
    inside, go_on = threading.Event(), threading.Event()
    real = store._database.write

    def slow(*arguments) -> None:
        real(*arguments)
        inside.set()
        assert go_on.wait(60)

    monkeypatch.setattr(store._database, "write", slow)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.add, [Document("plum", "a red apple plum", {"kind": "fruit"})])
        assert inside.wait(60)
        try:
            assert searches(store) == before
            assert not writing.done()
        finally:
            go_on.set()
        writing.result()
    assert all("plum" in {hit.document.id for hit in hits} for hits in searches(store))


def test_a_search_does_not_wait_for_the_commit_of_another_handle(store, path, embedder):
    with FaissStore.open(path, embedder, read_only=True) as reader:
        before = searches(reader)
        connection = store._database._connection
        connection.execute("BEGIN EXCLUSIVE")  # nobody else can read the file by SQLite's rules until this ends
        try:
            assert searches(reader) == before
        finally:
            connection.execute("ROLLBACK")


def test_a_reader_that_missed_a_commit_waits_rather_than_answer_from_an_older_one(store, path, embedder):
    with FaissStore.open(path, embedder, read_only=True) as reader:
        store.add([Document("plum", "a red apple plum")])
        connection = store._database._connection
        connection.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.05, connection.execute, ["ROLLBACK"])
        timer.start()
        assert "plum" in {hit.document.id for hit in reader.search("red apple")}
        timer.join()


@pytest.mark.parametrize("trouble", ["missing", "damaged"])
def test_a_document_that_is_being_replaced_just_now_is_waited_for(store, path, embedder, monkeypatch, trouble):
    with FaissStore.open(path, embedder, read_only=True) as reader:
        before = reader.search("red apple")
        real = reader._database.rows

        def torn(numbers, *, locked=True):
            if locked:
                return real(numbers)
            timer.start()
            if trouble == "damaged":
                raise CorruptStoreError(path, "a page is half old and half new")
            return {}

        monkeypatch.setattr(reader._database, "rows", torn)
        connection = store._database._connection
        connection.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.05, connection.execute, ["ROLLBACK"])
        assert reader.search("red apple") == before
        timer.join()


def test_documents_are_found_all_at_once_while_a_large_batch_is_added(store):
    """The vectors go into the index step by step; a search sees all of a commit or nothing."""
    seen = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for mode in ("dense", "lexical"):
                seen.add(sum(hit.document.id.startswith("new") for hit in store.search("many", 9000, mode=mode)))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        store.add([Document(f"new{n}", "many") for n in range(4500)])
        store.delete([f"new{n}" for n in range(0, 4500, 2)])
        done.set()
        looking.result()
    assert seen <= {0, 4500, 2250}


def test_32_threads_on_one_handle_leave_what_they_wrote(store):
    expected: dict[str, str] = {}

    def work(number: int) -> dict[str, str]:
        rng = random.Random(number)
        mine: dict[str, str] = {}
        for step in range(6):
            id = f"{number}-{rng.randrange(4)}"
            if rng.random() < 0.7:
                mine[id] = f"red apple {number} {step}"
                store.upsert([Document(id, mine[id])])
            else:
                mine.pop(id, None)
                store.delete([id])
            for hit in store.search("red apple", 50):
                assert hit.document.text
        return mine

    with ThreadPoolExecutor(32) as pool:
        for mine in pool.map(work, range(32)):
            expected.update(mine)

    assert {document.id: document.text for document in store.get(expected)} == expected
    assert len(store) == 4 + len(expected)
    assert store.verify().ok


def in_child(action) -> bytes:
    """Run `action` in a forked child and return what it says."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, str(action()).encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_unaffected(store, path, embedder):
    for use in (lambda: store.search("apple"), lambda: store.add(["x"]), lambda: len(store)):
        said = in_child(use)
        assert said.startswith(b"ForkedHandleError")
        assert b"open it again in process" in said
    assert in_child(store.close) == b"None"

    store.add([Document("after", "after the fork")])
    assert b"StoreLockedError" in in_child(lambda: FaissStore.open(path, embedder))
    assert in_child(lambda: len(FaissStore.open(path, embedder, read_only=True))) == b"5"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_lock(store, path, embedder):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)  # outlives the parent's handle
        os._exit(0)
    try:
        store.close()
        FaissStore.open(path, embedder).close()
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_child_that_was_just_forked_does_not_keep_the_lock_either(store, path, embedder):
    """Until it has run, it holds a copy of the open file; so does what a subprocess is before it becomes a program."""
    copy = os.dup(store._lock._descriptor)
    try:
        store.close()
        FaissStore.open(path, embedder).close()
    finally:
        os.close(copy)


def test_a_small_store_takes_no_lock_that_forked_processes_share(path, embedder, monkeypatch):
    """Another fork that is killed while it makes a progress bar would keep tqdm's lock for ever."""
    monkeypatch.setattr("qwen_rerank.store.index_file.tqdm", lambda *_, **__: pytest.fail("a progress bar was made"))
    with FaissStore.create(path, embedder) as store:
        store.add(["apple"])
        store.compact()
    next(path.glob("index-*")).unlink()
    with FaissStore.open(path, embedder) as again:
        assert len(again.search("apple")) == 1


def test_the_error_of_a_fork_is_a_store_error():
    from qwen_rerank.errors import StoreError

    assert issubclass(ForkedHandleError, StoreError)
