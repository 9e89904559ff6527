"""How many hours the training would take on this machine: a few steps on its own texts, timed, and what they add up to.

    python eval/pocket/mini/pace.py --work build/mini --output eval/pocket/mini/results/pace.json

`--work` needs `e5/` and `texts/` (`make.py` has them after its third step). Lists are drawn at random: what counts is how
long their texts are. The tokens of the whole are those that the shipped model's run took (`results/made.json`); what
reads texts once (teachers, lists, the comparison on development queries) is counted from the texts. Takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from batches import LONGEST_QUERY, batch, by_length, tokenized
from learning import LANGUAGES, Chooser, Settings, Training
from lists import TEACHERS, Lists, read
from model import Layer, from_origin

from qwen_rerank.evaluation.provenance import environment

LISTS, WIDTH, SAMPLE = 16, 12, 1000
SIZES = ((2_048, 8_192), (4_096, 16_384), (8_192, 32_768))  # tokens of one forward and of one backward pass
CHOSEN_PAIRS = 6 * 150 * 50  # development collections, their queries, candidates of each


def sampled(work: Path, language: str, device: str) -> tuple[Lists, int]:
    """Return random lists over a sample of the texts, and how many tokens all texts have."""
    draw = np.random.default_rng(0)
    asked, bodies = (read(work / "texts", name, language) for name in ("queries", "passages"))
    counts = []
    found = []
    for rows, key, longest in ((asked, "query", LONGEST_QUERY), (bodies, "text", 256)):
        texts = [rows[i][key] for i in draw.choice(len(rows), min(SAMPLE, len(rows)), replace=False)]
        found.append(tokenized(work / "e5", texts, query=key == "query", longest=longest, device=device))
        counts.append(int(found[-1].lengths.mean() * len(rows)))
    n = len(found[0])
    candidates = draw.integers(0, len(found[1]), (n, WIDTH + 4))
    opinions = draw.normal(size=(*candidates.shape, len(TEACHERS))).astype(np.float32)
    return Lists(*found, candidates, opinions, np.zeros(n, np.int64), ["cloze"] * n), sum(counts)


def trained(training: Training) -> float:
    """Return tokens a second of one step."""
    began, tokens = time.perf_counter(), training.tokens
    training.step()
    return (training.tokens - tokens) / (time.perf_counter() - began)


@torch.inference_mode()
def read_once(training: Training) -> float:
    """Return tokens a second of passages that are only read."""
    texts, tokens = training.choosers["en"].lists.passages, 0
    began = time.perf_counter()
    for part in list(by_length(texts.lengths[:200], 8192)):
        ids, mask = batch(texts, None, part, part, 256)
        with torch.autocast(ids.device.type, torch.bfloat16):
            training.model.states(ids, mask)
        tokens += int(mask.sum())
    return tokens / (time.perf_counter() - began)


def main() -> None:
    """Time, add up, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {language: sampled(options.work, language, options.device) for language in LANGUAGES}
    settings = Settings(steps=1000, batch=LISTS, tokens=4096, kept=8192)
    choosers = {language: Chooser(lists, [1.0] * 4, settings) for language, (lists, _) in found.items()}
    training = Training(from_origin(options.work / "e5").to(options.device), choosers, settings)
    training.settings = replace(settings, batch=1)
    trained(training)  # the first step loads what the others have
    pace = {"reading": read_once(training)}
    for tokens, kept in SIZES:
        training.settings = replace(settings, tokens=tokens, kept=kept)
        pace[f"training, {tokens} of {kept}"] = trained(training)
        print(pace, flush=True)
    plain, Layer.mixed_plainly = Layer.mixed_plainly, Layer.mixed
    pace["the last with fused attention"] = trained(training)
    Layer.mixed_plainly = plain
    best = max(value for name, value in pace.items() if name.startswith("training"))
    run = json.loads((Path(__file__).parent / "results" / "made.json").read_text(encoding="utf-8"))["training"]
    texts = sum(tokens for _, tokens in found.values())
    hours = {
        "train one": run["tokens"] / best / 3600,
        "lists, without BM25 and MaxSim": texts / pace["reading"] / 3600,
        "combine": CHOSEN_PAIRS * run["tokens"] / run["pairs"] / pace["reading"] / 3600,
    }
    report = {
        **environment(),
        "device": options.device,
        "threads": options.threads,
        "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
        "tokens of a run": run["tokens"],
        "tokens of the texts": texts,
        "tokens/s": {name: round(value) for name, value in pace.items()},
        "hours": {name: round(value, 2) for name, value in hours.items()},
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
