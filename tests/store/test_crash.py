"""Killed at any moment, a store opens with all that was acknowledged and nothing half done."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from qwen_rerank import BM25Index
from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document
from tests.store.worker import POOL, apply_to_model, run

EMBEDDER = HashEmbedder(16)
FORKS = multiprocessing.get_context("forkserver")  # what a worker imports is imported once
FORKS.set_forkserver_preload(["tests.store.worker", "pytest"])
# Starting a process also reaps the ended ones of other threads, and two readers of one exit status leave 255 to the second.
STARTING_OR_REAPING = Lock()
WORKER = [sys.executable, "-m", "tests.store.worker"]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def check(path: Path, model: dict[str, str], in_flight: list | None) -> tuple[dict[str, str], bool]:
    """Return what is in the store, which is the acknowledged state or, wholly, the one in flight; and which it is."""
    after = apply_to_model(model, in_flight) if in_flight else model
    with FaissStore.open(path, EMBEDDER) as store:
        found = {document.id: document.text for document in store.get({**model, **after})}
        assert len(store) == len(found)
        assert found in (model, after)
        assert store.verify().ok
        hits = {hit.document.id: hit.document.text for hit in store.search("apple pear", len(found) + 1, mode="dense")}
        assert hits.items() <= found.items()
        assert len(hits) == len(found) - store.without_vector
        words = store.search("apple pear", len(found) + 1, mode="lexical")
        assert words == BM25Index(store).search("apple pear", len(found) + 1)
    assert not list(path.glob("*.tmp"))
    assert len(list(path.glob("index-*.faiss"))) <= 1
    assert len(list(path.glob("words-*.bin"))) <= 1
    return found, found != model


def kill_one(path: Path, model: dict[str, str], seed: int) -> tuple[dict[str, str], Counter]:
    """Start a worker, kill it at a random moment, and check what it left."""
    rng = random.Random(seed)
    reading, writing = FORKS.Pipe(duplex=False)
    worker = FORKS.Process(target=run, args=(str(path), str(seed), writing))
    with STARTING_OR_REAPING:
        worker.start()
    writing.close()
    with os.fdopen(os.dup(reading.fileno()), "rb") as output:
        reading.close()
        # Counted in lines, so that a slow machine tests as much: one line while it opens, then two for each call.
        lines = [output.readline() for _ in range(rng.choice([1, 2, 4, 6, 8, 12]))]
        time.sleep(rng.choice([0, rng.uniform(0, 0.003), rng.uniform(0, 0.02)]))
        worker.kill()
        lines += output.read().split(b"\n")[:-1]
    with STARTING_OR_REAPING:
        worker.join()
    assert worker.exitcode == -signal.SIGKILL

    in_flight = None
    counts: Counter = Counter()
    for kind, *rest in map(json.loads, lines[1:]):
        if kind == "begin":
            in_flight = rest[0]
        else:
            model, in_flight = apply_to_model(model, in_flight), None
            counts["acknowledged"] += 1
    model, happened = check(path, model, in_flight)
    counts["killed inside a call" if in_flight else "killed between calls"] += 1
    counts["unacknowledged but whole"] += happened
    return model, counts


def test_kill_9_loses_nothing_acknowledged(tmp_path, full, capsys):
    """Two stores at once, each written to and killed over and over."""
    kills = 3000 if full else 40

    def lane(number: int) -> Counter:
        path, model, counts = tmp_path / f"store{number}", {}, Counter()
        FaissStore.create(path, EMBEDDER, index=["Flat", "HNSW8"][number]).close()
        for i in range(kills // 2):
            model, more = kill_one(path, model, seed=number * 1_000_000 + i)
            counts += more
        return counts

    with ThreadPoolExecutor(2) as pool:
        counts = sum(pool.map(lane, range(2)), Counter())

    with capsys.disabled():
        print(f"\n{kills} kills: {dict(counts)}, nothing lost")
    assert counts["killed inside a call"] + counts["killed between calls"] == kills
    assert counts["acknowledged"] > kills
    assert counts["killed inside a call"] > kills / 10


# Every system call in turn: killed at it, or failing with an error.

SCRIPT = [
    ["add", [["new1", "apple new1"], ["new2", "pear new2"]]],
    ["upsert", [["d1", "apple again"], ["d2", "pear again"]]],
    ["delete", ["d3", "d4"]],
    ["metadata", ["d5", "d6"]],
    ["declare", ["length"]],
    ["save", []],
    ["compact", []],
]
CALLS = ["fsync", "fdatasync", "pwrite64", "write", "rename", "unlink", "ftruncate", "openat"]


def strace(path: Path, log: Path, *options: str, script: list = SCRIPT) -> subprocess.CompletedProcess[bytes]:
    traced = [
        a
        for file in (path, *path.iterdir(), path / "commit.json.tmp", path / "documents.sqlite3-journal")
        for a in ("-P", str(file))
    ]
    command = ["strace", "-f", "-qq", "-o", str(log), *traced, *options, *WORKER, str(path), json.dumps(script)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "store"
    with FaissStore.create(path, EMBEDDER) as store:
        store.add([Document(id, f"apple {id}") for id in POOL])
    return path


@pytest.fixture(scope="module")
def places(prepared, tmp_path_factory) -> list[tuple[str, int]]:
    """Every (system call, how many-th) on the store's files."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("trace")
    path = Path(shutil.copytree(prepared, folder / "store"))
    result = strace(path, folder / "log", "-e", "trace=" + ",".join(CALLS))
    if b'["closed"]' not in result.stdout:
        pytest.skip(f"strace cannot trace here: {result.stderr[-200:]!r}")
    counts = Counter(re.findall(r"^\d+ +(\w+)\(", (folder / "log").read_text(), re.MULTILINE))
    assert counts["fsync"] + counts["fdatasync"] > 10
    return [(call, n) for call in CALLS for n in range(1, counts[call] + 1)]


@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=EIO", "error=ENOSPC"])
def test_a_fault_at_any_system_call_leaves_the_old_or_the_new_commit(prepared, places, tmp_path, full, fault, capsys):
    chosen = places if full else random.Random(fault).sample(places, 5)
    at_work, untyped = 0, []
    for number, (call, when) in enumerate(chosen):
        path = Path(shutil.copytree(prepared, tmp_path / f"{number}"))
        result = strace(path, tmp_path / "log", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}")
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        model, in_flight = {id: f"apple {id}" for id in POOL}, None
        for kind, *rest in lines[1:]:
            if kind == "begin":
                in_flight = rest[0]
            elif kind == "done":
                model, in_flight = apply_to_model(model, in_flight), None
        at_work += in_flight is not None
        typed = re.search(rb"\nqwen_rerank\.store\.errors\.\w+: ", result.stderr)
        if result.returncode > 0 and fault != "signal=SIGKILL" and not typed:
            untyped.append((call, when, result.stderr.decode()[-300:]))
        check(path, model, in_flight)
    with capsys.disabled():
        print(f"\n{fault} at {len(chosen)} of {len(places)} system calls, {at_work} inside a write")
    assert at_work > 0
    assert untyped == []


def test_nothing_is_left_to_a_power_loss_when_a_call_returns(prepared, places, tmp_path):
    """At each acknowledgement every file written and every folder changed has been fsynced since."""
    path, log = Path(shutil.copytree(prepared, tmp_path / "store")), tmp_path / "log"
    calls = ["write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "unlink"]
    command = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=" + ",".join(calls)]
    subprocess.run(
        [*command, *WORKER, str(path), json.dumps(SCRIPT)], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True
    )

    unsynced: set[str] = set()
    acknowledged = 0
    for line in log.read_text().splitlines():
        if r'"[\"done\"]' in line:
            assert unsynced == set()
            acknowledged += 1
            continue
        name = re.search(r"(\w+)\(", line)
        touched = [file for file in re.findall(r'[<"](/[^>"]*)[>"]', line) if file.startswith(str(path))]
        if name is None or not touched:
            continue
        if name[1] in ("fsync", "fdatasync"):
            unsynced.discard(touched[0])
        elif name[1] in ("rename", "unlink"):
            if touched[0] in unsynced and name[1] == "rename":
                unsynced.add(touched[1])
            unsynced.discard(touched[0])
            # The removal of a FAISS file that nothing names any more may be lost.
            unsynced |= {str(path)} if name[1] == "rename" or touched[0].endswith("-journal") else set()
        elif not touched[0].endswith(("writer.lock", "seal.json")):  # a seal that is lost or torn costs time alone
            unsynced.add(touched[0])
    assert acknowledged == len(SCRIPT)


@pytest.mark.parametrize("state", ["not acknowledged", "half written"])
def test_a_recovery_that_is_killed_again_and_again_ends_as_one_that_is_not(prepared, places, tmp_path, full, state):
    crashed = Path(shutil.copytree(prepared, tmp_path / "crashed"))
    model = {id: f"apple {id}" for id in POOL}
    with FaissStore.open(crashed, EMBEDDER) as store:
        before = (crashed / "commit.json").read_bytes()
        if state == "not acknowledged":
            store.add([Document("new", "apple new")])
            model["new"] = "apple new"
            shutil.copytree(crashed, tmp_path / "left")
            (tmp_path / "left" / "commit.json").write_bytes(before)
        else:
            with store._database.transaction():
                store._database._connection.execute("PRAGMA cache_size = 2")  # so that pages are written before the end
                store._database._connection.execute("UPDATE documents SET text = text || hex(zeroblob(4000))")
                shutil.copytree(crashed, tmp_path / "left")
                store._database._connection.execute("UPDATE documents SET text = substr(text, 1, length(text) - 8000)")
            assert (tmp_path / "left" / "documents.sqlite3-journal").stat().st_size > 0
    for junk in ("commit.json.tmp", "index-0123456789abcdef.faiss", "words-0123456789abcdef.bin.tmp"):
        (tmp_path / "left" / junk).write_bytes(b"junk")
    chosen = opening_places(tmp_path / "left", tmp_path)
    killed = 0
    for number, (call, when) in enumerate(chosen if full else random.Random(state).sample(chosen, 2)):
        path = Path(shutil.copytree(tmp_path / "left", tmp_path / f"{number}"))
        for _ in range(2):
            inject = f"inject={call}:signal=SIGKILL:when={when}"
            done = strace(path, tmp_path / "log", "-e", f"trace={call}", "-e", inject, script=[])
            killed += done.returncode != 0
        check(path, model, None)
    assert killed > 0


def opening_places(path: Path, tmp_path: Path) -> list[tuple[str, int]]:
    """Every (system call, how many-th) on the files of a store that is opened and closed."""
    copy = Path(shutil.copytree(path, tmp_path / "traced"))
    strace(copy, tmp_path / "log", "-e", "trace=" + ",".join(CALLS), script=[])
    counts = Counter(re.findall(r"^\d+ +(\w+)\(", (tmp_path / "log").read_text(), re.MULTILINE))
    return [(call, n) for call in CALLS for n in range(1, counts[call] + 1)]
