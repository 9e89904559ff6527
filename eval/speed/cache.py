"""What a score cache costs and saves: a request without one, a request it has not seen, and the same request again.

    python eval/speed/cache.py --tokenizer FOLDER [--layers 4] [--out cache.json]

One engine of the true width with few layers and random weights, so that the cache's own work weighs more than beside a
whole model. Every round scores new texts: without a cache, with one in memory and with one in a file, in turn; then the same
texts again, of the file also through a second cache, which finds nothing in memory. Texts of one length cost alike, so
the best round of each is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from contestants import Engine, model_config, random_model
from measure import hardware, versions
from workloads import Words

from qwen_rerank import CachedScorer
from qwen_rerank.protocols import SimpleScorer


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the official tokenizer files")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("cache.json"))
    options = parser.parse_args()
    machine = hardware("cpu")  # now: its load is that of others
    words = Words(options.tokenizer)
    model = random_model(model_config("0.6B", layers=options.layers), dtype=torch.bfloat16, device="cpu")
    plain = Engine(model, options.tokenizer, device="cpu", dtype="bfloat16", max_length=16_384).scorer
    seconds: dict[str, list[float]] = {}

    def timed(name: str, scorer: SimpleScorer, request: tuple[str, list[str]]) -> np.ndarray:
        start = time.perf_counter()
        scores = scorer.score(*request)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return np.asarray(scores)

    with tempfile.TemporaryDirectory() as folder:
        scorers = {
            "no cache": plain,
            "memory": CachedScorer(plain, cache=100_000),
            "file": CachedScorer(plain, cache=Path(folder) / "scores.db"),
        }
        for _ in range(options.rounds):
            for name, scorer in scorers.items():
                request = words.text(12), words.texts(*[128] * 16)
                first = timed(name if scorer is plain else f"{name}, not seen before", scorer, request)
                again = {} if scorer is plain else {f"{name}, seen": scorer}
                if name == "file":
                    again["file, seen by another process"] = CachedScorer(plain, cache=Path(folder) / "scores.db")
                for kind, cached in again.items():
                    if not np.array_equal(first, timed(kind, cached, request)):
                        raise SystemExit(f"{kind}: a kept score is another than the computed one.")
    # The first round also warms up what runs only once.
    best = {name: min(found[1:]) for name, found in seconds.items()}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"Qwen3-Reranker-0.6B shape, {options.layers} layers, random weights, bfloat16",
        "request": "16 documents of 128 tokens, new ones every time",
        "hardware": machine,
        "versions": versions(),
        "seconds": {name: [round(value, 5) for value in found] for name, found in seconds.items()},
        "best": {name: round(value, 5) for name, value in best.items()},
        "of a request without a cache": {
            name: round(value / best["no cache"], 4) for name, value in best.items() if name != "no cache"
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
