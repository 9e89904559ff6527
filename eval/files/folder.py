"""A folder of real texts, Chinese and English, that gives 10,000 passages: time and memory of `index`, and of a search.

    python -m eval.files.folder --data ../shared/data --work build/files make index again search
    python -m eval.files.folder make sample fill search      # where the machine is too busy to embed all of them
    python -m eval.files.folder table        # draws eval/files/README.md from folder.json

Each step is a process of its own, so that its memory is its own. Steps can be run one by one; each replaces its part of
eval/files/folder.json. `sample` embeds the first files alone, and `fill` stores all passages with vectors drawn at random: a
search takes as long over those as over real ones. CPU seconds stand beside the seconds of the clock, which mean little where
other programs run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from eval.speed.measure import hardware, versions
from qwen_rerank import FaissStore, Reranker, TwoStageRetriever, load_embedder, load_scorer
from qwen_rerank.folders import sync_folder
from qwen_rerank.folders.cutting import CutSettings, cut
from qwen_rerank.folders.sections import markdown
from qwen_rerank.protocols import NamedEmbedder as Embedder

HERE = Path(__file__).parent
RESULT = HERE / "folder.json"
PASSAGES = 10_000
COLLECTIONS = {"百科": ("cmrc2018", "drcd"), "papers": ("scifact", "cacm", "cisi")}
DOCUMENTS = 20  # of one file
DEPTH = 50
QUERIES = 20  # of each language
SAMPLE = 12  # files
STEPS = ("make", "index", "again", "sample", "fill", "search")


def make(data: Path, work: Path) -> dict[str, Any]:
    """Write Markdown files, by turns of each language, until they give 10,000 passages."""
    folder, total, n_files, n_bytes = work / "folder", 0, 0, 0
    shutil.rmtree(folder, ignore_errors=True)
    written = [
        [(f"{name}/{collection}-{n:03}.md", text) for collection in names for n, text in files_of(data / collection)]
        for name, names in COLLECTIONS.items()
    ]
    for name, text in (one for pair in zip_longest(*written) for one in pair if one):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        total += len(cut(markdown(text), CutSettings()))
        n_files, n_bytes = n_files + 1, n_bytes + len(text.encode())
        if total >= PASSAGES:
            break
    return {"files": n_files, "bytes": n_bytes, "passages": total}


def files_of(collection: Path) -> list[tuple[int, str]]:
    """Return (number, Markdown) of files that hold a collection's documents, each under its title."""
    from qwen_rerank.documents import read_corpus
    from qwen_rerank.documents.texts import find_table

    documents = read_corpus(find_table(collection, "corpus"))
    parts = [f"## {one.metadata.get('title') or one.id}\n\n{one.text}\n" for one in documents]
    return [
        (start // DOCUMENTS, "\n".join(parts[start : start + DOCUMENTS])) for start in range(0, len(parts), DOCUMENTS)
    ]


def index(data: Path, work: Path) -> dict[str, Any]:
    """Index the folder into a new store."""
    return indexed(work / "store", work / "folder", load_embedder("mini"))


def sample(data: Path, work: Path) -> dict[str, Any]:
    """Index the first files of each language into a store of their own."""
    part = work / "part"
    shutil.rmtree(part, ignore_errors=True)
    for name in COLLECTIONS:
        (part / name).mkdir(parents=True)
        for path in sorted((work / "folder" / name).glob("*.md"))[: SAMPLE // len(COLLECTIONS)]:
            shutil.copy(path, part / name)
    return indexed(work / "sample", part, load_embedder("mini"))


def fill(data: Path, work: Path) -> dict[str, Any]:
    """Index the folder into a new store with vectors that are drawn at random."""
    return indexed(work / "store", work / "folder", Random(load_embedder("mini")))


class Random:
    """Passes for an embedder; its vectors of documents mean nothing."""

    def __init__(self, real: Embedder) -> None:
        self.name, self.fingerprint, self.dim = real.name, real.fingerprint, real.dim
        self.embed_queries = real.embed_queries
        self._random = np.random.default_rng(0)

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`."""
        return self._random.standard_normal((len(texts), self.dim)).astype(np.float32)


def indexed(path: Path, folder: Path, embedder: Embedder) -> dict[str, Any]:
    """Index a folder into a new store, and return what that took."""
    shutil.rmtree(path, ignore_errors=True)
    begin, cpu = time.perf_counter(), time.process_time()
    with FaissStore.create(path, embedder) as store:
        report = sync_folder(store, [folder])
    size = sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "files": len(report.files),
        "passages": report.passages,
        "store_mb": round(size / 1e6, 1),
    }


def again(data: Path, work: Path) -> dict[str, Any]:
    """Index again: with nothing changed, and with one file changed."""
    path = sorted((work / "folder").rglob("*.md"))[0]
    taken = {}
    with FaissStore.open(work / "store", load_embedder("mini")) as store:
        for what in ("nothing changed", "one file changed"):
            if what == "one file changed":
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"\n## {time.time_ns()}\n\nA new part, at the end.\n")
            begin = time.perf_counter()
            report = sync_folder(store, [work / "folder"])
            taken[what] = {"seconds": round(time.perf_counter() - begin, 2), "embedded": report.embedded}
    return taken


def search(data: Path, work: Path) -> dict[str, Any]:
    """Load both stages and search for real questions of the collections."""
    queries = [text for names in COLLECTIONS.values() for text in questions(data / names[0])]
    begin = time.perf_counter()
    with FaissStore.open(work / "store", load_embedder("mini"), read_only=True) as store:
        line = TwoStageRetriever(store, Reranker(load_scorer("mini")), top_k=DEPTH, top_n=10)
        line.retrieve("a query before the others")
        loaded = time.perf_counter() - begin
        taken, cpu = [], []
        for query in queries:
            begin, used = time.perf_counter(), time.process_time()
            line.retrieve(query)
            taken.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - used)
        held = len(store)
    p50, p95 = np.quantile(taken, [0.5, 0.95])
    return {
        "documents": held,
        "queries": len(queries),
        "depth": DEPTH,
        "load_s": round(loaded, 2),
        "p50_s": round(float(p50), 3),
        "p95_s": round(float(p95), 3),
        "max_s": round(max(taken), 3),
        "cpu_p50_s": round(float(np.median(cpu)), 3),
        "cpu_max_s": round(max(cpu), 3),
    }


def questions(collection: Path) -> list[str]:
    """Return the first questions of a collection."""
    with (collection / "queries.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(QUERIES), lines, strict=False)]


def run(step: str, data: Path, work: Path) -> None:
    """Run one step and write what it measured."""
    measured = globals()[step](data, work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    own = {
        **measured,
        "peak_mb": round(peak),
        "omp_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load_average": round(os.getloadavg()[0], 1),
        "hardware": hardware("cpu"),
        "versions": versions(),
    }
    print(step, json.dumps(measured), f"{peak:.0f} MB")
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    if step == "index":  # what stood for it where it could not be measured
        result = {name: one for name, one in result.items() if name not in ("sample", "fill")}
    RESULT.write_text(json.dumps({**result, step: own}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def table() -> None:
    """Draw the page from the figures."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    made, searched = found["make"], found.get("search")
    rows = [("folder", f"{made['files']} Markdown files, {made['bytes'] / 1e6:.1f} MB, {made['passages']} passages")]
    for step, what in (
        ("index", "index it"),
        ("sample", "index a part of it"),
        ("fill", "read, cut and store it, vectors at random"),
    ):
        if (one := found.get(step)) and "cpu_s" in one:
            rate = one["passages"] / one["cpu_s"]
            rows.append(
                (
                    what,
                    f"{one['passages']} passages in {one['seconds']} s, {one['cpu_s']} s of CPU ({rate:.1f} a CPU second), "
                    f"{one['peak_mb']} MB of memory, {one['store_mb']} MB on disk",
                )
            )
    for what in ("nothing changed", "one file changed"):
        if "again" in found:
            rows.append((f"index again, {what}", f"{found['again'][what]['seconds']} s"))
    if searched:
        rows += [
            ("load both stages, first search", f"{searched['load_s']} s, {searched['peak_mb']} MB"),
            (
                f"a search, depth {searched['depth']}, {searched['queries']} questions",
                f"median {searched['p50_s']} s, 95 % within {searched['p95_s']} s, longest {searched['max_s']} s; of CPU "
                f"{searched['cpu_p50_s']} s in the median, {searched['cpu_max_s']} s at most",
            ),
        ]
    ran = ", ".join(
        f"{step}: OMP_NUM_THREADS {one['omp_threads']}, load {one['load_average']}" for step, one in found.items()
    )
    page = [
        "# Ten thousand passages of a folder, with the pair `mini`",
        "",
        "Drawn by `python -m eval.files.folder table` from folder.json, which the same script measured.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"On {made['hardware']['cpu']}. Threads, and the machine's load when each step ended: {ran}. With a load above the two",
        "cores, seconds of the clock are other programs' as well; seconds of CPU are its own.",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    """Run the steps that are named, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=(*STEPS, "table"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/files"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for step in given.steps:
        if step == "table":
            table()
        elif len(given.steps) == 1:
            run(step, given.data, given.work)
        else:
            command = [sys.executable, "-m", "eval.files.folder", step, "--data", given.data, "--work", given.work]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
