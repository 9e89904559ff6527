"""What a FaissStore costs over raw FAISS: build, save, open, search. Prints one JSON value.

python eval/store/bench.py --documents 100000 --dim 384 > eval/store/bench.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from qwen_rerank import Document, FaissStore

N_QUERIES = 200
TOP_K = 100


class TableEmbedder:
    """Hands out vectors made beforehand, so that embedding costs nothing."""

    fingerprint = "bench"

    def __init__(self, documents: np.ndarray, queries: np.ndarray) -> None:
        self.dim = documents.shape[1]
        self._documents = documents
        self._queries = queries

    def embed_queries(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of queries that are named by their number."""
        return self._queries[[int(text) for text in texts]]

    def embed_documents(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of all documents, in order."""
        return self._documents[: len(texts)]


def unit(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Return random vectors of length 1, float32 `(n, dim)`."""
    vectors = rng.standard_normal((n, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that an action takes, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def compare_searches(searches: dict[str, Callable[[int], Any]]) -> dict[str, dict[str, float]]:
    """Return median and best milliseconds of one query; the searches take turns, so that a busy machine hits all."""
    taken: dict[str, list[float]] = {name: [] for name in searches}
    for number in range(N_QUERIES):
        for name, search in searches.items():
            taken[name].append(timed(lambda s=search, n=number: s(n))[0] * 1000)
    return {name: {"median": statistics.median(times), "best": min(times)} for name, times in taken.items()}


def measure(documents: np.ndarray, queries: np.ndarray, folder: Path) -> dict[str, dict[str, Any]]:
    """Measure a store with texts of 500 characters and metadata, and FAISS alone: no texts, no ids, nothing durable."""
    raw: dict[str, Any] = {}
    store: dict[str, Any] = {}
    index = faiss.IndexFlatIP(documents.shape[1])
    raw["build_s"], _ = timed(lambda: index.add(documents))
    raw["save_s"], _ = timed(lambda: faiss.write_index(index, str(folder / "raw.faiss")))
    raw["open_s"], index = timed(lambda: faiss.read_index(str(folder / "raw.faiss")))

    path, embedder = folder / "store", TableEmbedder(documents, queries)
    texts = [Document(str(i), f"{i:<9} " + "word " * 98, {"tenth": i % 10}) for i in range(len(documents))]
    made = FaissStore.create(path, embedder, index="Flat", words=False, device="cpu")
    store["build_and_save_s"], _ = timed(lambda: (made.add(texts), made.close()))
    store["open_s"], opened = timed(lambda: FaissStore.open(path, embedder, device="cpu"))
    searches = compare_searches(
        {
            "raw": lambda n: index.search(queries[n : n + 1], TOP_K),
            "store": lambda n: opened.search(str(n), TOP_K),
            "filtered": lambda n: opened.search(str(n), TOP_K, filter={"tenth": n % 10}),
        }
    )
    raw["search_ms"], store["search_ms"], store["filtered_search_ms"] = searches.values()
    extra = [Document(f"new{i}", "a new word") for i in range(100)]
    store["add_one_ms"] = statistics.median(timed(lambda d=one: opened.add([d]))[0] for one in extra) * 1000
    opened.close()
    next(path.glob("index-*.faiss")).unlink()
    store["open_without_faiss_file_s"], opened = timed(lambda: FaissStore.open(path, embedder, device="cpu"))
    opened.close()
    return {"raw_faiss": raw, "store": store}


def rounded(value: Any) -> Any:
    """Return a tree of figures with three digits after the point."""
    return {key: rounded(one) for key, one in value.items()} if isinstance(value, dict) else round(value, 3)


def main() -> None:
    """Run both and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    documents, queries = unit(rng, arguments.documents, arguments.dim), unit(rng, N_QUERIES, arguments.dim)
    folder = Path(tempfile.mkdtemp())
    load = os.getloadavg()[0]
    try:
        results = measure(documents, queries, folder)
    finally:
        shutil.rmtree(folder)
    setting = {
        "documents": arguments.documents,
        "dim": arguments.dim,
        "top_k": TOP_K,
        "queries": N_QUERIES,
        "index": "Flat",
        "faiss": faiss.__version__,
        "sqlite": sqlite3.sqlite_version,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "faiss_threads": faiss.omp_get_max_threads(),
        "load_before": round(load, 1),
    }
    print(json.dumps({"setting": setting, **rounded(results)}, indent=1))


if __name__ == "__main__":
    main()
