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


def median_ms(action: Callable[[int], Any]) -> float:
    """Return the median milliseconds of one query."""
    for number in range(5):
        action(number)
    return statistics.median(timed(lambda n=number: action(n))[0] for number in range(N_QUERIES)) * 1000


def raw(documents: np.ndarray, queries: np.ndarray, folder: Path) -> dict[str, float]:
    """Measure FAISS alone: no texts, no ids, nothing durable."""
    index = faiss.IndexFlatIP(documents.shape[1])
    build_s, _ = timed(lambda: index.add(documents))
    save_s, _ = timed(lambda: faiss.write_index(index, str(folder / "raw.faiss")))
    open_s, index = timed(lambda: faiss.read_index(str(folder / "raw.faiss")))
    return {
        "build_s": build_s,
        "save_s": save_s,
        "open_s": open_s,
        "search_ms": median_ms(lambda n: index.search(queries[n : n + 1], TOP_K)),
    }


def store(documents: np.ndarray, queries: np.ndarray, folder: Path) -> dict[str, float]:
    """Measure a store of the same vectors with texts of 500 characters and metadata."""
    embedder = TableEmbedder(documents, queries)
    texts = [Document(str(i), f"{i:<9} " + "word " * 98, {"tenth": i % 10}) for i in range(len(documents))]
    made = FaissStore.create(folder / "store", embedder, device="cpu")
    build_s, _ = timed(lambda: made.add(texts))
    save_s, _ = timed(made.close)
    open_s, opened = timed(lambda: FaissStore.open(folder / "store", embedder, device="cpu"))
    result = {
        "build_s": build_s,
        "save_s": save_s,
        "open_s": open_s,
        "search_ms": median_ms(lambda n: opened.search(str(n), TOP_K)),
        "filtered_search_ms": median_ms(lambda n: opened.search(str(n), TOP_K, filter={"tenth": n % 10})),
    }
    extra = [Document(f"new{i}", "a new word") for i in range(100)]
    result["add_one_ms"] = statistics.median(timed(lambda d=document: opened.add([d]))[0] for document in extra) * 1000
    opened.close()
    (index_file,) = (folder / "store").glob("index-*.faiss")
    index_file.unlink()
    result["open_without_faiss_file_s"], opened = timed(
        lambda: FaissStore.open(folder / "store", embedder, device="cpu")
    )
    opened.close()
    return result


def main() -> None:
    """Run both and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    documents, queries = unit(rng, arguments.documents, arguments.dim), unit(rng, N_QUERIES, arguments.dim)
    folder = Path(tempfile.mkdtemp())
    try:
        results = {"raw_faiss": raw(documents, queries, folder), "store": store(documents, queries, folder)}
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
    }
    rounded = {name: {key: round(value, 3) for key, value in figures.items()} for name, figures in results.items()}
    print(json.dumps({"setting": setting, **rounded}, indent=1))


if __name__ == "__main__":
    main()
