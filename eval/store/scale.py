"""A store of up to a million passages: build time, memory, disk, time of a search and recall, beside raw FAISS.

python eval/store/scale.py --data ../shared/data --passages 1000000 > eval/store/scale.json

The passages are real text and distinct; the embedder is the one that ships. Query embedding is not counted. Recall is the
share of the exact 100 best, found by comparing all vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import file_digest
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from passages import passages, queries

from qwen_rerank import Document, FaissStore, load_embedder

TOP_K = 100
TARGET = 0.95  # recall that the store is tuned for, on every other query; the rest are measured
CHUNK = 20_000
SHARES = (0.001, 0.01, 0.1, 0.5)  # of the documents, that a filter keeps


def say(*parts: object) -> None:
    """Tell on stderr how far it is."""
    print(f"{time.strftime('%H:%M:%S')}", *parts, file=sys.stderr, flush=True)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that an action takes, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def embedded(texts: Sequence[str], embedder: Any) -> np.ndarray:
    """Return the vectors of texts, float32 `(n_texts, dim)`."""
    return np.concatenate([embedder.embed_documents(texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK)])


def milliseconds(search: Callable[[int], Any], count: int) -> dict[str, float]:
    """Return median and 95th percentile of one search each, in milliseconds, after one that is not counted."""
    search(0)
    taken = [timed(lambda n=number: search(n))[0] * 1000 for number in range(count)]
    p50, p95 = np.quantile(taken, [0.5, 0.95])
    return {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2)}


def exact(vectors: np.ndarray, asked: np.ndarray, kept: np.ndarray | None = None) -> list[set[int]]:
    """Return the places of the exact 100 best of each query, among all or among those that are kept."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    places = np.arange(len(vectors)) if kept is None else np.flatnonzero(kept)
    index.add(vectors[places])
    return [set(places[one].tolist()) for one in index.search(asked, min(TOP_K, len(places)))[1]]


def recall(found: Sequence[Sequence[Any]], wanted: Sequence[set[int]]) -> float:
    """Return the mean share of the exact best that was found."""
    shares = [
        len(best & {int(hit.document.id) for hit in hits}) / len(best) for hits, best in zip(found, wanted, strict=True)
    ]
    return round(float(np.mean(shares)), 4)


def build(path: Path, texts: Sequence[str], vectors: np.ndarray, asked: list[str], embedder: Any) -> dict[str, Any]:
    """Fill a new store in batches, tune it, and return what that took."""
    with FaissStore.create(path, embedder, indexed_fields=["share"]) as store:
        taken = 0.0
        for start in range(0, len(texts), CHUNK):
            batch = [
                Document(str(n), texts[n], {"share": (n * 7919) % 1000 / 1000, "chars": len(texts[n])})
                for n in range(start, min(len(texts), start + CHUNK))
            ]
            taken += timed(lambda b=batch, s=start: store.upsert(b, vectors=vectors[s : s + CHUNK]))[0]
            say(f"{start + len(batch)} stored, {taken:.0f} s, {store._vectors.index.kind}")
        rebuilt, _ = timed(store.rebuild_index)
        say(f"built anew in {rebuilt:.0f} s, {store._vectors.index.kind}")
        tuned_s, tuned = timed(lambda: store.tune(asked, target=TARGET))
        say(f"tuned in {tuned_s:.0f} s", *tuned)
        closed, _ = timed(store.close)
    return {
        "add_s": round(taken, 1),
        "rebuild_index_s": round(rebuilt, 1),
        "close_s": round(closed, 1),
        "tuned": [asdict(one) for one in tuned],
    }


def measure(path: Path, vectors: np.ndarray, asked: list[str], embedder: Any) -> dict[str, Any]:
    """Open the store and return times and recall of every kind of search."""
    result: dict[str, Any] = {}
    of_queries = embedder.embed_queries(asked)
    asked = [text for text, vector in zip(asked, of_queries, strict=True) if vector.any()]
    of_queries = np.ascontiguousarray(of_queries[of_queries.any(axis=1)])
    index_path = next(path.glob("index-*.faiss"))
    files = [one for one in path.iterdir() if one.suffix in (".faiss", ".bin", ".sqlite3")]
    result["file_mb"] = {one.name.split("-")[0]: round(one.stat().st_size / 1e6, 1) for one in files}
    result["sha256_of_all_files_s"] = round(
        sum(timed(lambda p=one: file_digest(p.open("rb"), "sha256"))[0] for one in files), 2
    )
    seconds, raw = timed(lambda: faiss.read_index(str(index_path)))
    result["raw_read_index_s"] = round(seconds, 2)
    seconds, store = timed(lambda: FaissStore.open(path, embedder, read_only=True))
    first, _ = timed(lambda: store.search_many([asked[0]], TOP_K, vectors=of_queries[:1]))
    result["open_and_first_search_s"] = round(seconds + first, 2)
    say("opened", result)

    def ask(mode: str, n: int, **options: Any) -> list[Any]:
        vector = None if mode == "lexical" else of_queries[n : n + 1]
        return store.search_many([asked[n]], TOP_K, mode=mode, vectors=vector, **options)[0]

    wanted = exact(vectors, of_queries)
    base = faiss.downcast_index(raw.index)
    inner = store._vectors.index
    parameters = inner._parameters(125, None, 1.0, 0) if inner.kind != "Flat" else None
    result["index"] = inner.kind
    result["raw_faiss_ids"] = milliseconds(
        lambda n: base.search(of_queries[n : n + 1], 125, params=parameters), len(asked)
    )
    result["store_ids"] = milliseconds(lambda n: inner.search(of_queries[n : n + 1], TOP_K), len(asked))
    ids = [hit.document.id for hit in ask("dense", 0)]
    result["get_100_documents"] = milliseconds(lambda n: store.get(ids), 50)
    for mode in ("dense", "lexical", "hybrid"):
        result[mode] = milliseconds(lambda n, m=mode: ask(m, n), len(asked))
    result["dense"]["recall"] = recall([ask("dense", n) for n in range(len(asked))], wanted)
    say("searched", result)
    share_of = (np.arange(len(vectors)) * 7919) % 1000 / 1000
    for share in SHARES:
        kept = share_of < share
        best = exact(vectors, of_queries, kept)
        filter = {"share": {"$lt": share}}
        some = dict(milliseconds(lambda n, f=filter: ask("dense", n, filter=f), len(asked)))
        # A filter that was never asked before: nothing of it is remembered.
        fresh = [
            timed(lambda n=n, s=share: ask("dense", n, filter={"share": {"$lt": s, "$gte": -n - 1.0}}))[0]
            for n in range(20)
        ]
        some["new_filter_p50_ms"] = round(float(np.median(fresh)) * 1000, 2)
        some["recall"] = recall([ask("dense", n, filter=filter) for n in range(len(asked))], best)
        result[f"dense, {share:.1%} kept"] = some
        say(share, some)
    store.close()
    result["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return result


def main() -> None:
    """Build, measure, print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    texts = passages(arguments.data, arguments.passages)
    embedder = load_embedder("pocket")
    seconds, vectors = timed(lambda: embedded(texts, embedder))
    known = vectors.any(axis=1)
    texts = [text for text, one in zip(texts, known, strict=True) if one]
    vectors = np.ascontiguousarray(vectors[known])
    say(f"{len(texts)} passages, embedded in {seconds:.0f} s")
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        asked = queries(arguments.data, arguments.queries)
        built = build(folder / "store", texts, vectors, asked[1::2], embedder)
        say("built", built)
        measured = measure(folder / "store", vectors, asked[::2], embedder)
    finally:
        shutil.rmtree(folder)
    setting = {
        "passages": len(texts),
        "dim": vectors.shape[1],
        "queries": arguments.queries,
        "top_k": TOP_K,
        "embed_s": round(seconds, 1),
        "faiss": faiss.__version__,
        "sqlite": sqlite3.sqlite_version,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
    }
    print(json.dumps({"setting": setting, "build": built, **measured}, indent=1))


if __name__ == "__main__":
    main()
