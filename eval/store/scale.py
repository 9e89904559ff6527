"""A store of up to a million passages: build time, memory, disk, time of a search and recall, beside raw FAISS.

python eval/store/scale.py embed build/scale --data ../shared/data --passages 1000000
python eval/store/scale.py build build/scale
python eval/store/scale.py measure build/scale > eval/store/scale.json

The passages are real text and distinct; the embedder is the one that ships. Query embedding is not counted. Recall is the
share of the exact 100 best, found by comparing all vectors while building. FAISS alone searches the same index with the
same parameters and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sqlite3
import sys
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
from qwen_rerank.store.index import _deeper

TOP_K = 100
MEASURED = 200  # queries; the store is tuned on the others
TARGET = 0.95  # recall that the store is tuned for
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


def exact(vectors: np.ndarray, asked: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Return the places of the exact 100 best of each query, among all or among those that are kept."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    places = np.arange(len(vectors)) if kept is None else np.flatnonzero(kept)
    index.add(vectors[places])
    return places[index.search(asked, min(TOP_K, len(places)))[1]]


def recall(found: Sequence[Sequence[Any]], wanted: np.ndarray) -> float:
    """Return the mean share of the exact best that was found."""
    shares = [
        len({*best} & {int(hit.document.id) for hit in hits}) / len(best)
        for hits, best in zip(found, wanted.tolist(), strict=True)
    ]
    return round(float(np.mean(shares)), 4)


def fill(path: Path, texts: Sequence[str], vectors: np.ndarray, embedder: Any) -> dict[str, Any]:
    """Fill a new store in batches, and return what that took."""
    shares = share_of(len(texts)).tolist()
    with FaissStore.create(path, embedder, indexed_fields=["share"]) as store:
        taken = 0.0
        for start in range(0, len(texts), CHUNK):
            batch = [
                Document(str(n), texts[n], {"share": shares[n], "chars": len(texts[n])})
                for n in range(start, min(len(texts), start + CHUNK))
            ]
            taken += timed(lambda b=batch, s=start: store.upsert(b, vectors=vectors[s : s + CHUNK]))[0]
            say(f"{start + len(batch)} stored, {taken:.0f} s, {store._vectors.index.kind}")
        closed, _ = timed(store.close)
    return {
        "add_s": round(taken, 1),
        "close_s": round(closed, 1),
    }


def embed(folder: Path, data: Path, n_passages: int, n_queries: int) -> None:
    """Write the passages, the queries and the vectors of the passages to a new folder."""
    started = conditions()
    texts = passages(data, n_passages)
    say(f"{len(texts)} passages")
    seconds, vectors = timed(lambda: embedded(texts, load_embedder("pocket")))
    known = vectors.any(axis=1)
    texts = [text for text, one in zip(texts, known, strict=True) if one]
    say(f"{len(texts)} embedded in {seconds:.0f} s")
    folder.mkdir(parents=True)
    np.save(folder / "vectors.npy", vectors[known])
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "asked.json").write_text(json.dumps(queries(data, n_queries)), encoding="utf-8")
    setting = {"passages": len(texts), "dim": vectors.shape[1], "embed_s": round(seconds, 1), "embedding": started}
    (folder / "embed.json").write_text(json.dumps(setting), encoding="utf-8")


def build(folder: Path) -> None:
    """Make a store of what was embedded, and beside it the queries with their exact answers and what all that took."""
    setting = json.loads((folder / "embed.json").read_text(encoding="utf-8"))
    setting["building"] = conditions()
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    vectors, embedder = np.load(folder / "vectors.npy"), load_embedder("pocket")
    built = fill(folder / "store", texts, vectors, embedder)
    built["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    say("built", built)
    measured, tuned = asked[:MEASURED], asked[MEASURED:]
    of_queries = embedder.embed_queries(measured)
    measured = [text for text, vector in zip(measured, of_queries, strict=True) if vector.any()]
    of_queries = np.ascontiguousarray(of_queries[of_queries.any(axis=1)])
    answers = {"all": exact(vectors, of_queries)}
    for share in SHARES:
        answers[str(share)] = exact(vectors, of_queries, share_of(len(texts)) < share)
    np.savez(folder / "queries.npz", vectors=of_queries, **answers)
    asked_json = json.dumps({"measured": measured, "tuned": tuned})
    (folder / "queries.json").write_text(asked_json, encoding="utf-8")
    (folder / "build.json").write_text(json.dumps({"setting": setting, "build": built}), encoding="utf-8")


def share_of(count: int) -> np.ndarray:
    """Return the number from 0 to 1 that each document has to be filtered by."""
    return (np.arange(count) * 7919) % 1000 / 1000


def conditions() -> dict[str, Any]:
    """Return what a time depends on besides the code."""
    return {
        "cores": os.cpu_count(),
        "threads": faiss.omp_get_max_threads(),
        "load": round(os.getloadavg()[0], 1),
        "cpu": next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), ""),
        "faiss": faiss.__version__,
        "sqlite": sqlite3.sqlite_version,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def opening(path: Path, embedder: Any, asked: str, vector: np.ndarray) -> dict[str, Any]:
    """Return sizes of a store's files, the seconds until it has answered, and those of reading the files otherwise."""
    files = [one for one in path.iterdir() if one.suffix in (".faiss", ".bin", ".sqlite3")]
    hashed = sum(timed(lambda p=one: file_digest(p.open("rb"), "sha256"))[0] for one in files)
    read, _ = timed(lambda: faiss.read_index(str(next(path.glob("index-*.faiss")))))
    opened, store = timed(lambda: FaissStore.open(path, embedder, read_only=True))
    first, _ = timed(lambda: store.search_many([asked], TOP_K, vectors=vector))
    store.close()
    return {
        "file_mb": {one.name.split("-")[0]: round(one.stat().st_size / 1e6, 1) for one in files},
        "sha256_of_all_files_s": round(hashed, 2),
        "raw_read_index_s": round(read, 2),
        "open_s": round(opened, 2),
        "open_and_first_search_s": round(opened + first, 2),
    }


def measure(folder: Path) -> dict[str, Any]:
    """Open the store and return times and recall of every kind of search."""
    path, embedder = folder / "store", load_embedder("pocket")
    saved = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    texts = json.loads((folder / "queries.json").read_text(encoding="utf-8"))
    asked = texts["measured"]
    with np.load(folder / "queries.npz") as arrays:
        of_queries = arrays["vectors"]
        answers = {name: arrays[name] for name in arrays.files if name != "vectors"}
    result: dict[str, Any] = {"setting": {**saved["setting"], "queries": len(asked), "top_k": TOP_K}}
    result["setting"]["measuring"] = conditions()
    result["build"] = saved["build"]
    with FaissStore.open(path, embedder) as store:
        seconds, tuned = timed(lambda: store.tune(texts["tuned"], target=TARGET))
        result["tune_s"], result["tuned"] = round(seconds, 1), [asdict(one) for one in tuned]
        say(f"tuned in {seconds:.0f} s", *tuned)
    # 1. Twice, and the second time counts: the files are in the system's cache for all.
    opening(path, embedder, asked[0], of_queries[:1])
    result.update(opening(path, embedder, asked[0], of_queries[:1]))
    say("opened", result)
    store = FaissStore.open(path, embedder, read_only=True)

    def ask(mode: str, n: int, **options: Any) -> list[Any]:
        vector = None if mode == "lexical" else of_queries[n : n + 1]
        return store.search_many([asked[n]], TOP_K, mode=mode, vectors=vector, **options)[0]

    # 2. Searches.
    inner = store._vectors.index
    depth = TOP_K if inner.lossless else _deeper(TOP_K)
    parameters = None if inner.exact else inner._parameters(depth, None, 1.0, 0)
    result["index"] = inner.kind
    result["raw_faiss_ids"] = milliseconds(
        lambda n: inner._base.search(of_queries[n : n + 1], depth, params=parameters), len(asked)
    )
    result["store_ids"] = milliseconds(lambda n: inner.search(of_queries[n : n + 1], TOP_K), len(asked))
    ids = [hit.document.id for hit in ask("dense", 0)]
    result["get_100_documents"] = milliseconds(lambda n: store.get(ids), 200)
    for mode in ("dense", "lexical", "hybrid"):
        result[mode] = milliseconds(lambda n, m=mode: ask(m, n), len(asked))
    result["dense"]["recall"] = recall([ask("dense", n) for n in range(len(asked))], answers["all"])
    say("searched", result)
    # 3. Filters.
    for share in SHARES:
        filter = {"share": {"$lt": share}}
        some = dict(milliseconds(lambda n, f=filter: ask("dense", n, filter=f), len(asked)))
        # A filter that was never asked before: nothing of it is remembered.
        fresh = [
            timed(lambda n=n, s=share: ask("dense", n, filter={"share": {"$lt": s, "$gte": -n - 1.0}}))[0]
            for n in range(20)
        ]
        some["new_filter_p50_ms"] = round(float(np.median(fresh)) * 1000, 2)
        some["recall"] = recall([ask("dense", n, filter=filter) for n in range(len(asked))], answers[str(share)])
        result[f"dense, {share:.1%} kept"] = some
        say(share, some)
    store.close()
    result["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    result["setting"]["load_after"] = round(os.getloadavg()[0], 1)
    return result


def main() -> None:
    """Take one step in a folder; the last one prints one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("embed", "build", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.step == "embed":
        embed(arguments.folder, arguments.data, arguments.passages, arguments.queries)
    elif arguments.step == "build":
        build(arguments.folder)
    else:
        print(json.dumps(measure(arguments.folder), indent=1))


if __name__ == "__main__":
    main()
