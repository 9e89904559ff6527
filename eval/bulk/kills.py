"""A collection embedded and reranked on a real Ray, workers and drivers killed at random, the rows compared with one process.

python eval/bulk/kills.py --data ../shared/data --output eval/bulk/kills.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

from qwen_rerank import BM25Index, load_scorer
from qwen_rerank.bulk import Workers, embed_corpus, read_rows, rerank_runs
from qwen_rerank.documents import read_corpus, read_queries
from qwen_rerank.evaluation.provenance import environment

SCORER = partial(load_scorer, "pocket", dtype="float32", deterministic=True)
DEPTH = 10
EMBED = {"embedder": "pocket", "block_rows": 20}
RERANK: dict[str, Any] = {"scorer": SCORER, "block_rows": 1}


def inputs(collection: Path, folder: Path, *, queries: int) -> tuple[Path, Path]:
    """Write the corpus, and the first queries with what BM25 finds, and return both files."""
    documents = read_corpus(collection / "corpus.jsonl")
    index = BM25Index(documents)
    lines = []
    for query_id, query in list(read_queries(collection / "queries.jsonl").items())[:queries]:
        hits = index.search(query, DEPTH)
        found = [{"id": hit.document.id, "text": hit.document.text, "score": hit.score} for hit in hits]
        lines.append(json.dumps({"query_id": query_id, "query": query, "candidates": found}) + "\n")
    runs = folder / "runs.jsonl"
    runs.write_text("".join(lines), encoding="utf-8")
    return collection / "corpus.jsonl", runs


def both(corpus: Path, runs: Path, output: Path, workers: Workers | None = None) -> None:
    """Run the two jobs."""
    embed_corpus(corpus, output / "vectors", workers=workers, **EMBED)  # type: ignore[arg-type]
    rerank_runs(runs, output / "ranked", workers=workers, **RERANK)


def rows(output: Path) -> list[list[dict[str, Any]]]:
    """Return all rows of both jobs."""
    return [
        [row for table in read_rows(str(output / job)) for row in table.to_pylist()] for job in ("vectors", "ranked")
    ]


def workers_of(root: int) -> list[int]:
    """Return the processes below `root` that hold a model."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below, found = {root}, []
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    for pid in below:
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(pid)
        except OSError:
            continue
    return found


def killed_again_and_again(
    corpus: Path, runs: Path, folder: Path, address: str, *, kills: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Run the jobs, killing workers and drivers, until drivers were killed so often; compare the rows of each that ends."""
    chance = random.Random(seed)
    alone = rows(folder / "alone")
    counts = {"driver_kills": 0, "worker_kills": 0, "rounds": 0, "same_rows": 0, "driver_starts": 0}
    began = time.monotonic()
    while counts["driver_kills"] < kills and time.monotonic() - began < seconds:
        output = folder / f"round-{counts['rounds']}"
        command = [sys.executable, __file__, "--driver", address, str(corpus), str(runs), str(output)]
        while True:
            counts["driver_starts"] += 1
            driver = subprocess.Popen(command, stderr=subprocess.PIPE)
            spare = counts["driver_kills"] >= kills or time.monotonic() - began >= seconds
            end = None if spare else time.monotonic() + chance.uniform(1, 14)
            next_worker = time.monotonic() + chance.uniform(2, 10)
            while driver.poll() is None and (end is None or time.monotonic() < end):
                time.sleep(0.05)
                if time.monotonic() > next_worker and (found := workers_of(os.getpid())):
                    os.kill(chance.choice(found), signal.SIGKILL)
                    counts["worker_kills"] += 1
                    next_worker = time.monotonic() + chance.uniform(3, 10)
            if driver.poll() is None:
                driver.kill()
                counts["driver_kills"] += 1
            said = driver.communicate()[1].decode()
            if driver.returncode == 0:
                break
            if driver.returncode > 0 and "could not do its block" not in said:
                raise SystemExit(f"a driver ended by itself: {said}")
        counts["rounds"] += 1
        counts["same_rows"] += rows(output) == alone
        print(counts, file=sys.stderr)
    return {**counts, "seconds": round(time.monotonic() - began, 1)}


def scaling(corpus: Path, folder: Path, *, embedder: str) -> list[dict[str, Any]]:
    """Return the speed of embedding with one and with two raylets of one CPU each."""
    found = []
    for raylets in (1, 2):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(raylets - 1):
            cluster.add_node(num_cpus=1)
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        output = folder / f"raylets-{raylets}"
        began = time.monotonic()
        status = embed_corpus(corpus, output, workers=raylets, embedder=embedder, block_rows=20)
        seconds = time.monotonic() - began
        times = sorted(entry.stat().st_mtime for entry in (output / "manifest").iterdir())
        nodes = len(ray.nodes())
        ray.shutdown()
        cluster.shutdown()
        rate = (len(times) - 1) * EMBED["block_rows"] / (times[-1] - times[0])  # type: ignore[operator]
        one = {"raylets": nodes, "workers": raylets, "rows": status.rows, "job_seconds": round(seconds, 2)}
        found.append({**one, "rows_per_s_between_first_and_last_block": round(rate, 1)})
    return found


def main() -> None:
    """Measure, or with --driver run the jobs as the driver that is killed."""
    if sys.argv[1] == "--driver":
        address, corpus, runs, output = sys.argv[2:]
        both(Path(corpus), Path(runs), Path(output), Workers(count=2, cpus=0.5, retries=5, address=address))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--collection", default="noveleval")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=400, help="after which no further driver is killed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--embedder", default="pocket", help="of the scaling; a slow one shows the workers, not the driver"
    )
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, runs = inputs((given.data / given.collection).resolve(), folder, queries=given.queries)
        began = time.monotonic()
        both(corpus, runs, folder / "alone")
        alone_seconds = time.monotonic() - began
        lengths = [len(job) for job in rows(folder / "alone")]
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        address = ray.get_runtime_context().gcs_address
        limits = {"kills": given.kills, "seconds": given.seconds, "seed": given.seed}
        killed = killed_again_and_again(corpus, runs, folder, address, **limits)
        ray.shutdown()
        result = {
            "collection": given.collection,
            "vectors": lengths[0],
            "ranked_rows": lengths[1],
            "one_process_seconds": round(alone_seconds, 1),
            "asked_driver_kills": given.kills,
            "killed": killed,
            "scaling": scaling(corpus, folder, embedder=given.embedder),
            "scaling_embedder": given.embedder,
            "ray": ray.__version__,
            "load_average": os.getloadavg(),
            "environment": environment(),
        }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("killed", "scaling")}, indent=1))
    if killed["same_rows"] != killed["rounds"]:
        raise SystemExit(f"{killed['rounds'] - killed['same_rows']} of {killed['rounds']} rounds gave other rows.")


if __name__ == "__main__":
    main()
