"""Speed of the engine beside the official recipe, sentence-transformers and vLLM, on one model, in turn.

    python eval/speed/bench.py --tokenizer FOLDER [--device cuda] [--size 0.6B] [--out results.json]
    python eval/speed/bench.py --tokenizer FOLDER --device cpu --dtype bfloat16 --formats   # float32, bfloat16 and int8

Random weights of the true shape: speed does not depend on their values. Contestants take turns within each round, and
the best round of each counts, so that a busy machine slows all of them alike. Exits with 1 when scores disagree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from contestants import (
    VLLM_ENVIRONMENT,
    Contestant,
    Engine,
    Recipe,
    SentenceTransformers,
    Vllm,
    model_config,
    random_model,
)
from measure import PeakMemory, computed_tokens, groups_of, hardware, matmul_peak, timed, useful_flops, versions
from peers import LlamaCpp, OnnxRuntime, OpenVino
from report import table, write_plot
from workloads import Words, Workload, cpu_workloads, gpu_workloads, smoke_workloads

from qwen_rerank.prompt import PromptEncoder, PromptTokenizer
from qwen_rerank.scorers.qwen.device import activation_bytes
from qwen_rerank.scorers.qwen.scorer import shared_prefix_of

# Largest difference of log-odds between contestants that rounding explains, at these random weights.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}
# Contestants in a number format of their own, whose scores are meant to differ.
FORMATS = {
    "engine-float32": "float32",
    "engine-int8": "int8",
    "engine-int8-outliers": "int8",
    "vllm-int8": "int8",
    "llama-q8": "int8",
    "openvino-int8": "int8",
    "onnxruntime-int8": "int8",
}
# Contestants whose bars are of one workload.
ONCE, ONE_QUERY = ("engine-float32", "engine-int8-outliers"), "1x16x128"


def main() -> int:
    """Run the benchmark."""
    options = parse()
    torch.set_num_threads(options.threads) if options.threads else None
    machine = hardware(options.device)  # now: its load is that of others
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32"))
    words = Words(options.tokenizer)
    workloads = choose(options, words)
    model = random_model(model_config(options.size, layers=options.layers), dtype=dtype, device=options.device)
    contestants, not_run = build(options, model, dtype, words)
    engine = contestants["engine"]
    report = {**header(options, model, contestants, dtype, machine), "not_run": not_run}
    encoder = PromptEncoder(PromptTokenizer((options.tokenizer / "tokenizer.json").read_text()))
    formats = sorted({str(dtype).removeprefix("torch."), *(FORMATS[name] for name in contestants if name in FORMATS)})
    report["peak_flops_before"] = report["peak_flops_after"] = peaks(formats, options.device)
    for workload in workloads:
        report["workloads"][workload.name] = run(workload, contestants, engine, encoder, options)
        if workload.name == ONE_QUERY and options.formats:
            for name in ONCE:  # not needed again, and the machine's memory is
                if name in contestants:
                    contestants.pop(name).scorer.close()
        finish(report)
        save(report, options.out)
    if not options.quick and not options.formats:
        report["callers"] = callers(engine, words, small=options.device == "cpu")
        if options.device.startswith("cuda"):
            report["queue"] = asyncio.run(queue(engine, words))
    report["peak_flops_after"] = peaks(formats, options.device)
    finish(report)
    save(report, options.out)
    print(table(report))
    write_plot(report, options.out.with_suffix(".png"))
    return 0 if report["scores_agree"] else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the official tokenizer files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="0.6B", choices=["0.6B", "4B", "8B", "tiny"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look; such figures are not for quoting")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--batch-size", type=int, help="of the recipe with the last logit alone; else 8 on CPU, 32 on CUDA"
    )
    parser.add_argument(
        "--vllm-block-size", type=int, default=32, help="longer than a shared prefix, it shares nothing"
    )
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without compilation")
    parser.add_argument("--only", nargs="*", help="contestants to run")
    parser.add_argument("--workloads", nargs="*", help="names of workloads, by their beginnings")
    parser.add_argument(
        "--formats",
        action="store_true",
        help="on a CPU also the engine in float32 and in int8, plain and with planted outliers, and peers in 8 bits",
    )
    parser.add_argument("--node-modules", type=Path, help="folder with node-llama-cpp, for llama.cpp")
    parser.add_argument("--quick", action="store_true", help="seconds of work, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    return parser.parse_args()


def choose(options: argparse.Namespace, words: Words) -> list[Workload]:
    """Return the workloads for this device."""
    if options.quick:
        found = smoke_workloads(words)
    elif options.device == "cpu":
        found = cpu_workloads(words)
    else:
        found = gpu_workloads(words, large=options.size in ("4B", "8B"))
    return [w for w in found if not options.workloads or any(w.name.startswith(name) for name in options.workloads)]


def build(
    options: argparse.Namespace, model: Any, dtype: torch.dtype, words: Words
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the contestants that can run here, each having done what it does only once, and why the others cannot."""
    on_cpu = options.device == "cpu"
    batch, batch_sizes = options.batch_size or (8 if on_cpu else 32), (1, 2, 4, 8, 16, 32) if on_cpu else (32, 64, 128)
    vllm = {"enforce_eager": options.vllm_eager, "block_size": options.vllm_block_size}
    engine = {"device": options.device, "dtype": str(dtype).removeprefix("torch."), "max_length": 16_384}
    formats = {
        "engine-float32": lambda: Engine(model, options.tokenizer, **{**engine, "dtype": "float32"}),
        "engine-int8": lambda: Engine(model, options.tokenizer, **engine, quantize="int8"),
        "engine-int8-outliers": lambda: Engine(model, options.tokenizer, **engine, quantize="int8", outliers=True),
    }
    vllm_in_8_bits = {
        "vllm-int8": lambda: Vllm(
            model, options.tokenizer, dtype=engine["dtype"], max_length=16_384, int8=True, **vllm
        ),
    }
    peers_in_8_bits = {
        "llama-q8": lambda: LlamaCpp(
            model, options.tokenizer, node_modules=options.node_modules, threads=torch.get_num_threads()
        ),
        "openvino-int8": lambda: OpenVino(
            model, options.tokenizer, threads=torch.get_num_threads(), batch_sizes=batch_sizes[:3]
        ),
        "onnxruntime-int8": lambda: OnnxRuntime(
            model, options.tokenizer, threads=torch.get_num_threads(), batch_sizes=batch_sizes[:3]
        ),
    }
    makers = {
        "recipe": lambda: Recipe(model, options.tokenizer, batch_size=8, last_only=False),
        "recipe-last": lambda: Recipe(model, options.tokenizer, batch_size=batch, last_only=True),
        "sentence-transformers": lambda: SentenceTransformers(
            model, options.tokenizer, batch_sizes=batch_sizes, tried=16 if on_cpu else 200
        ),
        "engine": lambda: Engine(model, options.tokenizer, **engine),
        "engine-deterministic": lambda: Engine(model, options.tokenizer, **engine, deterministic=True),
        # Before vLLM, whose processes hold gigabytes that a conversion needs for a moment.
        **({**formats, **peers_in_8_bits} if on_cpu and options.formats else {}),
        "vllm": lambda: Vllm(model, options.tokenizer, dtype=engine["dtype"], max_length=16_384, **vllm),
        **(vllm_in_8_bits if on_cpu and options.formats else {}),
    }
    found: dict[str, Contestant] = {}
    not_run: dict[str, str] = {}
    queries, documents = words.texts(12), [words.texts(16, 24)]
    for name, make in makers.items():
        if options.only and name not in (*options.only, "engine"):
            not_run[name] = "not asked for"
            continue
        try:
            contestant = make()
            contestant.score(queries, documents)
            found[name] = contestant
        except Exception as exc:  # each peer fails in its own way, and none may cost the others' figures
            not_run[name] = f"{type(exc).__name__}: {exc}"
            print(f"{name}: not measured ({exc})", file=sys.stderr)
    return found, not_run


def header(
    options: argparse.Namespace,
    model: Any,
    contestants: dict[str, Any],
    dtype: torch.dtype,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """Return what the figures hold for."""
    engine = contestants["engine"]
    scorer = engine.scorer
    shape = engine.config
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"Qwen3-Reranker-{options.size} shape, {shape.n_layers} layers, random weights",
        "device": options.device,
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": machine,
        "versions": versions(),
        "settings": {
            "recipe": "batches of 8",
            "sentence-transformers": "the fastest of the batch sizes tried, see seconds_by_batch_size",
            "matrices_in_groups": {
                name: len(contestant.scorer.quantization.grouped)
                for name, contestant in contestants.items()
                if isinstance(contestant, Engine) and FORMATS.get(name) == "int8"
            },
            "exact_share_of_weights": {
                name: contestant.scorer.quantization.exact_share
                for name, contestant in contestants.items()
                if isinstance(contestant, Engine) and FORMATS.get(name) == "int8"
            },
            "node-llama-cpp": None
            if options.node_modules is None
            else json.loads((options.node_modules / "node-llama-cpp" / "package.json").read_text())["version"],
            "vllm": {
                "eager": options.vllm_eager,
                "block_size": options.vllm_block_size,
                **{name: os.environ.get(name) for name in VLLM_ENVIRONMENT},
            },
        },
        "token_budget": scorer.token_budget,
        "budget_bytes": scorer.token_budget * activation_bytes(shape, dtype),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "workloads": {},
        "callers": {},
        "queue": {},
    }


def peaks(formats: Sequence[str], device: str) -> dict[str, float]:
    """Return the matmul peak of every number format that a contestant computes in."""
    return {name: matmul_peak(device, getattr(torch, name)) for name in formats}


def run(
    workload: Workload,
    contestants: dict[str, Contestant],
    engine: Any,
    encoder: PromptEncoder,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the figures of one workload."""
    # The other formats run what vLLM runs: the longest documents are beyond what their peers were made for.
    formats = FORMATS if "vllm" in workload.engines else ()
    names = [name for name in (*workload.engines, *formats) if name in contestants]
    if workload.name != ONE_QUERY:
        names = [name for name in names if name not in ONCE]
    tried = {name: contestants[name].tune(workload.queries, workload.documents) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, np.ndarray] = {}
    memory: dict[str, int] = {}

    def score(name: str) -> None:
        scores[name] = np.concatenate(contestants[name].score(workload.queries, workload.documents))

    for _ in range(workload.rounds):
        for name in names:
            contestants[name].forget()
            with PeakMemory(options.device) as peak:
                seconds[name].append(timed(lambda name=name: score(name), options.device))
            memory[name] = max(memory.get(name, 0), peak.bytes)
            print(f"{workload.name:40} {name:24} {seconds[name][-1]:8.3f} s", file=sys.stderr, flush=True)
    shared_prefix = shared_prefix_of(encoder, None) if options.device == "cpu" else None
    groups = groups_of(encoder, workload.queries, workload.documents, shared_prefix=shared_prefix)
    flops = useful_flops(groups, engine.config)
    full = sum(len(group.prefix) * len(group.documents) + sum(map(len, group.documents)) for group in groups)
    return {
        "queries": len(workload.queries),
        "documents": workload.n_documents,
        "tokens": full,
        "tokens_after_sharing": computed_tokens(groups),
        "useful_flops": flops,
        "contestants": {
            name: {
                "seconds": [round(value, 4) for value in seconds[name]],
                "documents_per_s": workload.n_documents / min(seconds[name]),
                "ms_p50": 1e3 * float(np.percentile(seconds[name], 50)) / len(workload.queries),
                **(
                    {"ms_p95": 1e3 * float(np.percentile(seconds[name], 95)) / len(workload.queries)}
                    if len(seconds[name]) >= 10
                    else {}
                ),
                # The models of vLLM and llama.cpp are in processes of their own.
                "peak_bytes_beside_weights": None if isinstance(contestants[name], (Vllm, LlamaCpp)) else memory[name],
                "flops_per_s": flops / min(seconds[name]),
                "largest_difference": float(np.abs(scores[name] - scores[names[0]]).max()),
                **({"seconds_by_batch_size": tried[name]} if tried[name] else {}),
            }
            for name in names
        },
    }


def callers(engine: Any, words: Words, *, small: bool) -> dict[str, Any]:
    """Return throughput and latency of 1, 8 and 64 callers from threads, each with its own query."""
    found: dict[str, Any] = {}
    n_documents, length, calls = (2, 32, 64) if small else (50, 128, 256)
    for n in (1, 8, 64):
        requests = [(words.text(12), words.texts(*[length] * n_documents)) for _ in range(min(calls, 8 * n))]
        latencies: list[float] = []

        def call(request: tuple[str, list[str]], latencies: list[float] = latencies) -> None:
            start = time.perf_counter()
            engine.scorer.score(*request)
            latencies.append(time.perf_counter() - start)

        with ThreadPoolExecutor(n) as pool:
            start = time.perf_counter()
            list(pool.map(call, requests))
            seconds = time.perf_counter() - start
        found[str(n)] = {
            "documents_per_call": n_documents,
            "tokens_per_document": length,
            "calls": len(requests),
            "documents_per_s": n_documents * len(requests) / seconds,
            "ms_p50": 1e3 * float(np.percentile(latencies, 50)),
            "ms_p95": 1e3 * float(np.percentile(latencies, 95)),
        }
        print(f"{n} callers: {found[str(n)]}", file=sys.stderr, flush=True)
    return found


async def queue(engine: Any, words: Words, *, seconds: float = 4.0) -> dict[str, Any]:
    """Return the highest tried rate of 10-item requests of 300 tokens whose 99th percentile stays within 500 ms.

    Requests arrive at random (Poisson), whether or not earlier ones are answered.
    """
    found: dict[str, Any] = {"tried": []}
    requests = [(words.text(57), words.texts(*[167] * 10)) for _ in range(200)]
    for items_per_s in (500, 1000, 1500, 2000, 2500, 3000, 4000, 5000, 6000):
        latencies: list[float] = []

        async def one(i: int, latencies: list[float] = latencies) -> None:
            start = time.perf_counter()
            await engine.scorer.ascore(*requests[i % len(requests)])
            latencies.append(time.perf_counter() - start)

        draw, tasks, end = random.Random(0), [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            tasks.append(asyncio.create_task(one(len(tasks))))
            await asyncio.sleep(draw.expovariate(items_per_s / 10))
        await asyncio.gather(*tasks)
        p99 = 1e3 * float(np.percentile(latencies, 99))
        found["tried"].append({"items_per_s": 10 * len(tasks) / seconds, "ms_p99": p99})
        print(f"queue: {found['tried'][-1]}", file=sys.stderr, flush=True)
        if p99 > 500:
            break
        found["items_per_s_within_500_ms"] = 10 * len(tasks) / seconds
    return found


def finish(report: dict[str, Any]) -> None:
    """Add what follows from the figures."""
    before, after = report["peak_flops_before"], report["peak_flops_after"]
    report["peak_flops"] = {name: max(before[name], after[name]) for name in before}
    differences = []
    for workload in report["workloads"].values():
        results = workload["contestants"]
        for name, result in results.items():
            result["share_of_peak"] = result["flops_per_s"] / report["peak_flops"][FORMATS.get(name, report["dtype"])]
            if name not in FORMATS:
                differences.append(result["largest_difference"])
        if "engine" in results:
            engine = results["engine"]["documents_per_s"]
            workload["engine_over"] = {
                name: engine / result["documents_per_s"] for name, result in results.items() if name != "engine"
            }
    report["largest_difference"] = max(differences, default=0.0)
    report["scores_agree"] = report["largest_difference"] <= TOLERANCE[report["dtype"]]


def save(report: dict[str, Any], path: Path) -> None:
    """Write the report; also half-way, so that an interrupted run leaves what it has."""
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
