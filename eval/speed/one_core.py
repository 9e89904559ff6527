"""Every format of the engine and sentence-transformers on one core, in CPU time, which a busy machine hardly disturbs.

    python eval/speed/one_core.py --tokenizer FOLDER [--layers 4] [--out one-core.json]

The thread that computes is the only one that counts, so that waiting for a core is not measured; `bench.py` measures
what a user waits for, with all cores, and needs an idle machine. Takes the best of its rounds, in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from contestants import Engine, SentenceTransformers, model_config, random_model
from measure import groups_of, hardware, useful_flops, versions
from workloads import Words

from qwen_rerank.prompt import PromptEncoder, PromptTokenizer
from qwen_rerank.scorers.qwen.scorer import shared_prefix_of

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int8, planted outliers": {"dtype": "bfloat16", "quantize": "int8", "outliers": True},
}


def main() -> None:
    """Measure, and write what was found."""
    options = parse()
    torch.set_num_threads(1)
    words = Words(options.tokenizer)
    workloads = {
        "1x8x128": ([words.text(12)], [words.texts(*[128] * 8)]),
        "1x6 mixed 20-400": ([words.text(12)], [words.spread(6, 20, 400)]),
        "1x1x2000": ([words.text(12)], [words.texts(2000)]),
    }
    model = random_model(model_config("0.6B", layers=options.layers), dtype=torch.bfloat16, device="cpu")
    peaks = matmul_peaks()
    engines = {
        name: Engine(model, options.tokenizer, device="cpu", max_length=16_384, threads=1, **given)
        for name, given in FORMATS.items()
    }
    peers = {
        f"sentence-transformers, batches of {size}, bfloat16": SentenceTransformers(
            model, options.tokenizer, batch_sizes=(size,), tried=1
        )
        for size in (1, 2, 4)
    }
    encoder = PromptEncoder(PromptTokenizer((options.tokenizer / "tokenizer.json").read_text()))
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"Qwen3-Reranker-0.6B shape, {options.layers} layers, random weights",
        "clock": "CPU time of the process, one thread",
        "hardware": hardware("cpu"),
        "versions": versions(),
        "rounds": options.rounds,
        "exact_share_of_weights": {
            name: engine.scorer.quantization.exact_share
            for name, engine in engines.items()
            if engine.scorer.quantization is not None
        },
        "workloads": {},
    }
    for name, (queries, documents) in workloads.items():
        groups = groups_of(encoder, queries, documents, shared_prefix=shared_prefix_of(encoder, None))
        flops, n = useful_flops(groups, engines["bfloat16"].config), sum(map(len, documents))
        # A batch size that is no smaller than the documents makes the same batch as one that is.
        contestants = {**engines, **dict(list(peers.items())[: n.bit_length()])}
        for contestant in engines.values():
            contestant.score(queries, documents)
        seconds = dict.fromkeys(contestants, float("inf"))
        for _ in range(options.rounds):
            for who, contestant in contestants.items():
                seconds[who] = min(seconds[who], cpu_seconds(partial(contestant.score, queries, documents)))
        report["workloads"][name] = {
            who: {
                "cpu_seconds": took,
                "documents_per_cpu_s": n / took,
                "flops_per_s": flops / took,
                "bfloat16_is": took / seconds["bfloat16"],
            }
            for who, took in seconds.items()
        }
        for who, found in report["workloads"][name].items():
            print(f"{name:18} {who:48} {found}", flush=True)
    report["peak_flops"] = {
        each: max(peak, again) for (each, peak), again in zip(peaks.items(), matmul_peaks().values(), strict=True)
    }
    for found in report["workloads"].values():
        for who, result in found.items():
            result["share_of_peak"] = result["flops_per_s"] / report["peak_flops"][format_of(who)]
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the official tokenizer files")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("one-core.json"))
    return parser.parse_args()


def matmul_peaks() -> dict[str, float]:
    """Return the FLOP/s of one core in a large product of each format."""
    rows, weight = torch.randn(1024, 1024), torch.randn(6144, 1024)
    linear = torch.nn.functional.linear
    products: dict[str, Callable[[], Any]] = {
        "float32": partial(linear, rows, weight),
        "bfloat16": partial(linear, rows.bfloat16(), weight.bfloat16()),
        "int8": partial(torch._int_mm, rows.to(torch.int8), weight.to(torch.int8).t().contiguous()),
    }
    return {name: 2 * 1024 * 1024 * 6144 / min(map(cpu_seconds, [run] * 4)) for name, run in products.items()}


def format_of(contestant: str) -> str:
    """Return the number format that a contestant multiplies in."""
    return next(name for name in ("int8", "float32", "bfloat16") if name in contestant)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds that `work` takes in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
