"""How large the pocket models are, how long they take to load, and to rerank 50 candidates.

    python eval/pocket/speed.py --output eval/pocket/results/speed.json

Every load is that of a fresh process after its imports, which are timed apart. The candidates are those that the pocket embedder finds
for the shipped queries in the shipped texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "eval" / "speed"))

POCKET = ROOT / "src" / "qwen_rerank" / "pocket"
CANDIDATES, ROUNDS = 50, 10
LOAD = """
import time; start = time.perf_counter()
{imports}
imported = time.perf_counter()
{load}
print(imported - start, time.perf_counter() - imported)
"""
MODELS = {
    "embedder": ("from qwen_rerank.embedders.static import StaticEmbedder", "qwen_rerank.load_embedder('pocket')"),
    "reranker": ("from qwen_rerank.scorers.qwen.scorer import QwenScorer", "qwen_rerank.QwenScorer('pocket')"),
}


def main() -> None:
    """Print the figures as JSON; with `--output` write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    from measure import hardware, versions

    report = {"hardware": hardware("cpu"), "versions": versions()}
    for name, (imports, load) in MODELS.items():
        report[name] = {"megabytes": megabytes(POCKET / name), **loading(f"import qwen_rerank\n{imports}", load)}
    report["reranking"] = reranking()
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def megabytes(folder: Path) -> float:
    """Return the size of a folder's files."""
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 2)


def loading(imports: str, load: str, *, repeats: int = 5) -> dict[str, float]:
    """Return the median seconds of the imports and of the load, in fresh processes."""
    code = LOAD.format(imports=imports, load=load)
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(repeats)
    ]
    imported, loaded = np.median([[float(part) for part in run.stdout.split()] for run in runs], axis=0)
    return {"import_s": round(float(imported), 3), "load_s": round(float(loaded), 3)}


def reranking() -> dict[str, float]:
    """Return milliseconds of reranking 50 candidates, and how long those are."""
    from qwen_rerank import QwenScorer, load_embedder
    from qwen_rerank.samples import load_sample
    from qwen_rerank.training import EmbeddedDocuments

    scorer, embedder = QwenScorer("pocket"), load_embedder("pocket")
    documents = [document for language in ("zh", "en") for document in load_sample(language).documents]
    queries = [query for language in ("zh", "en") for query in load_sample(language).queries]
    first_stage = EmbeddedDocuments(documents, embedder)
    found = [[c.document.text for c in first_stage.search(query, CANDIDATES)] for query in queries]
    scorer.score(queries[0], found[0])
    milliseconds = []
    for _ in range(ROUNDS):
        for query, texts in zip(queries, found, strict=True):
            start = time.perf_counter()
            scorer.score(query, texts)
            milliseconds.append(1e3 * (time.perf_counter() - start))
    lengths = [
        len(prompt.ids)
        for query, texts in zip(queries, found, strict=True)
        for prompt in scorer.encoder.encode(query, texts)
    ]
    return {
        "candidates": CANDIDATES,
        "prompt_tokens_median": float(np.median(lengths)),
        "ms_p50": round(float(np.percentile(milliseconds, 50)), 1),
        "ms_p95": round(float(np.percentile(milliseconds, 95)), 1),
    }


if __name__ == "__main__":
    main()
