"""Engines for words, side by side: build time, size on disk, time of a query, and what a crash can cost.

python eval/store/words_engines.py --data ../shared/data --passages 300000 > eval/store/words_engines.json

All four search the same terms (`qwen_rerank.words.terms`, joined by spaces), so that they differ as engines and not in how
they split texts. Needs bm25s and tantivy besides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import tantivy
from passages import passages, queries, read_collection

from qwen_rerank.evaluation.measures import measure
from qwen_rerank.words import WordIndex, terms

TOP_K = 100
QUALITY = ("scifact", "rgb_zh_dev", "vaswani_npl")
CHUNK = 20_000
DURABILITY = {
    "ours": "one file named with its SHA-256 in the store's database; stale or damaged: caught up or rebuilt from it",
    "bm25s": "files without checksums; nothing can be added: every change builds all of it again",
    "sqlite-fts5": "in the database's own transaction; a flipped bit in its tables passes integrity_check unseen",
    "tantivy": "a commit of its own beside the database's; checksums are looked at only when asked for",
}

Search = Callable[[str], list[int]]


def ours(texts: list[str], folder: Path) -> tuple[Search, Callable[[], None]]:
    """Return the search of a `WordIndex`, and what saves it."""
    index = WordIndex()
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        index.add(np.arange(start, start + len(part)), part)
    return lambda query: index.search(query, TOP_K)[0].tolist(), lambda: index.write(folder / "words.bin")


def with_bm25s(texts: list[str], folder: Path) -> tuple[Search, Callable[[], None]]:
    """Return the search of a bm25s index with the same parameters, and what saves it."""
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index([terms(text) for text in texts], show_progress=False)

    def search(query: str) -> list[int]:
        known = [term for term in terms(query) if term in index.vocab_dict]
        if not known:
            return []
        scores = index.get_scores(known)
        best = np.argpartition(-scores, min(TOP_K, len(scores) - 1))[:TOP_K]
        best = best[scores[best] > 0]
        return best[np.argsort(-scores[best], kind="stable")].tolist()

    return search, lambda: index.save(str(folder / "bm25s"))


def fts5(texts: list[str], folder: Path) -> tuple[Search, Callable[[], None]]:
    """Return the search of an FTS5 table over the terms; every transaction is durable as the store's are."""
    base = sqlite3.connect(folder / "fts5.sqlite3", isolation_level=None)
    base.execute("PRAGMA synchronous = EXTRA")
    base.execute("CREATE VIRTUAL TABLE words USING fts5(terms, content='', tokenize='ascii')")
    for start in range(0, len(texts), CHUNK):
        base.execute("BEGIN")
        part = enumerate(texts[start : start + CHUNK], start=start)
        base.executemany("INSERT INTO words (rowid, terms) VALUES (?, ?)", ((n, " ".join(terms(t))) for n, t in part))
        base.execute("COMMIT")

    def search(query: str) -> list[int]:
        wanted = " OR ".join(f'"{term}"' for term in dict.fromkeys(terms(query)))
        if not wanted:
            return []
        found = base.execute("SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?", (wanted, TOP_K))
        return [row for (row,) in found]

    return search, lambda: None


def with_tantivy(texts: list[str], folder: Path) -> tuple[Search, Callable[[], None]]:
    """Return the search of a tantivy index over the terms; it is committed as often as the FTS5 table."""
    (folder / "tantivy").mkdir()
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("row", stored=True)
    builder.add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
    index = tantivy.Index(builder.build(), path=str(folder / "tantivy"))
    writer = index.writer(200_000_000, 1)
    for start in range(0, len(texts), CHUNK):
        for number, text in enumerate(texts[start : start + CHUNK], start=start):
            writer.add_document(tantivy.Document(row=number, terms=" ".join(terms(text))))
        writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def search(query: str) -> list[int]:
        parts = [(tantivy.Occur.Should, tantivy.Query.term_query(index.schema, "terms", term)) for term in terms(query)]
        if not parts:
            return []
        hits = searcher.search(tantivy.Query.boolean_query(parts), TOP_K).hits
        return [searcher.doc(address)["row"][0] for _, address in hits]

    return search, lambda: None


ENGINES = {"ours": ours, "bm25s": with_bm25s, "sqlite-fts5": fts5, "tantivy": with_tantivy}


def speed(texts: list[str], asked: list[str]) -> dict[str, dict[str, Any]]:
    """Return build time, size and time of a query of every engine; the engines take turns at each query."""
    folder = Path(tempfile.mkdtemp())
    results: dict[str, dict[str, Any]] = {}
    searches: dict[str, Search] = {}
    try:
        for name, make in ENGINES.items():
            (folder / name).mkdir()
            start = time.perf_counter()
            searches[name], save = make(texts, folder / name)
            save()
            taken = time.perf_counter() - start
            size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
            results[name] = {"build_and_save_s": round(taken, 1), "disk_mb": round(size / 1e6, 1)}
        times: dict[str, list[float]] = {name: [] for name in ENGINES}
        for query in asked:
            for name, search in searches.items():
                start = time.perf_counter()
                search(query)
                times[name].append((time.perf_counter() - start) * 1000)
        for name, taken_ms in times.items():
            low, high = np.quantile(taken_ms, [0.5, 0.95])
            results[name] |= {"p50_ms": round(float(low), 2), "p95_ms": round(float(high), 2)}
    finally:
        shutil.rmtree(folder)
    return results


def quality(data: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the measures of every engine on a few collections."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in ENGINES}
    for collection in QUALITY:
        documents, texts, qrels = read_collection(data / collection, "test")
        for name, make in ENGINES.items():
            with tempfile.TemporaryDirectory() as folder:
                search, _ = make([document.text for document in documents], Path(folder))
                run = {
                    query: [(documents[row].id, -float(n)) for n, row in enumerate(search(texts[query]))]
                    for query in qrels
                }
            means = measure(run, qrels, ("nDCG@10", "R@100")).means
            found[name][collection] = {key: round(value, 4) for key, value in means.items()}
    return found


def main() -> None:
    """Compare the engines and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=300_000)
    parser.add_argument("--queries", type=int, default=300)
    arguments = parser.parse_args()
    texts = passages(arguments.data, arguments.passages)
    setting = {
        "passages": len(texts),
        "queries": arguments.queries,
        "top_k": TOP_K,
        "load_before": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "bm25s": bm25s.__version__,
    }
    measured = speed(texts, queries(arguments.data, arguments.queries))
    better = quality(arguments.data)
    table = {name: {**measured[name], "quality": better[name], "durability": DURABILITY[name]} for name in ENGINES}
    print(json.dumps({"setting": setting, "engines": table}, indent=1))


if __name__ == "__main__":
    main()
