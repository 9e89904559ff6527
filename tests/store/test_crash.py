"""Killed at any moment, a store opens with all that was acknowledged and nothing half done."""

from __future__ import annotations

import json
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

import pytest

from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

from .worker import POOL, apply_to_model

EMBEDDER = HashEmbedder(16)
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
        hits = {hit.document.id: hit.document.text for hit in store.search("apple pear", len(found) + 1)}
        assert hits.items() <= found.items()
        assert len(hits) == len(found) - store.without_vector
    assert not list(path.glob("*.tmp"))
    assert len(list(path.glob("index-*.faiss"))) <= 1
    return found, found != model


def kill_one(path: Path, model: dict[str, str], seed: int) -> tuple[dict[str, str], Counter]:
    """Start a worker, kill it at a random moment, and check what it left."""
    rng = random.Random(seed)
    worker = subprocess.Popen([*WORKER, str(path), str(seed)], stdout=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT)
    assert worker.stdout is not None
    lines = [worker.stdout.readline()]  # it begins to open the store
    if rng.random() < 0.8:
        lines.append(worker.stdout.readline())  # it begins its first call
    time.sleep(rng.choice([rng.uniform(0, 0.01), rng.uniform(0, 0.05)]))
    worker.send_signal(signal.SIGKILL)
    lines += worker.stdout.read().split(b"\n")[:-1]
    worker.stdout.close()
    assert worker.wait() == -signal.SIGKILL

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
    kills = 2000 if full else 100

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
    ["save", []],
    ["compact", []],
]
CALLS = ["fsync", "fdatasync", "pwrite64", "write", "rename", "unlink", "ftruncate", "openat"]


def strace(path: Path, log: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    traced = [
        a
        for file in (path, *path.iterdir(), path / "commit.json.tmp", path / "documents.sqlite3-journal")
        for a in ("-P", str(file))
    ]
    command = ["strace", "-f", "-qq", "-o", str(log), *traced, *options, *WORKER, str(path), json.dumps(SCRIPT)]
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
def test_a_fault_at_any_system_call_leaves_the_old_or_the_new_commit(prepared, places, tmp_path, full, fault):
    chosen = places if full else random.Random(fault).sample(places, 8)
    at_work = 0
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
        if result.returncode > 0 and fault != "signal=SIGKILL":
            assert re.search(rb"\nqwen_rerank\.store\.errors\.\w+: ", result.stderr), (
                call,
                when,
                result.stderr.decode(),
            )
        check(path, model, in_flight)
    assert at_work > 0
