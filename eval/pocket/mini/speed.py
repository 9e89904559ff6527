"""How large the pair "mini" is, how long it takes to load in a fresh process, and to score 50 pairs of 128 tokens.

    python eval/pocket/mini/speed.py --output eval/pocket/mini/results/speed.json

Loading is timed from the start of the process to its end, Python and imports included. A pair of 128 tokens is a question
of the shipped encyclopedia with its sentences, one after another, cut to 128 tokens by the model's own limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

import qwen_rerank
from qwen_rerank import CrossEncoderScorer
from qwen_rerank.evaluation.provenance import environment
from qwen_rerank.samples import load_encyclopedia

SHIPPED = Path(qwen_rerank.__file__).parent / "mini"
PAIRS, TOKENS, ROUNDS = 50, 128, 15
LOADS = {
    "reranker": "from qwen_rerank import load_scorer; load_scorer('mini')",
    "embedder": "from qwen_rerank import load_embedder; load_embedder('mini')",
    "pair": "from qwen_rerank import load_embedder, load_scorer; load_scorer('mini'); load_embedder('mini')",
}


def loading(code: str, *, repeats: int = 7) -> dict[str, float]:
    """Return the median and the longest seconds of fresh processes that load and end."""
    runs = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        runs.append(time.perf_counter() - started)
    return {"median_s": round(float(np.median(runs)), 3), "max_s": round(max(runs), 3)}


def scoring(threads: int) -> dict[str, float]:
    """Return milliseconds of scoring 50 pairs of 128 tokens."""
    scorer = CrossEncoderScorer("mini", backend="onnx", threads=threads, max_length=TOKENS)
    sample = load_encyclopedia("en")
    texts = [document.text for document in sample.documents]
    long = [" ".join(texts[i : i + 8]) for i in range(PAIRS)]
    query = sample.queries[0]
    assert all(fit.tokens >= TOKENS for fit in scorer.fit(query, long)), "a text is too short"
    scorer.score(query, long)
    runs = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        scorer.score(query, long)
        runs.append(1e3 * (time.perf_counter() - started))
    return {"median_ms": round(float(np.median(runs)), 1), "min_ms": round(min(runs), 1), "max_ms": round(max(runs), 1)}


def main() -> None:
    """Print the figures as JSON; with `--output` write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    report = {
        **environment(),
        "onnxruntime": onnxruntime.__version__,
        "megabytes": round(sum(path.stat().st_size for path in SHIPPED.iterdir()) / 1e6, 2),
        "loading": {name: loading(code) for name, code in LOADS.items()},
        "pairs": PAIRS,
        "tokens": TOKENS,
        "scoring": {f"{threads} threads": scoring(threads) for threads in options.threads},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
