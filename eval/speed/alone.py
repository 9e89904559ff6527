"""One contestant's turn: made, warmed up, and timed on its workloads in a process that it has to itself.

`bench.py` starts it as `alone.py CONTESTANT FOLDER`; `asked.json` of the folder says what to run, and `CONTESTANT.json` is
written there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from contestants import Contestant, Engine, Recipe, SentenceTransformers, Vllm, model_config, random_model
from measure import PeakMemory, timed
from peers import LlamaCpp, OnnxRuntime, OpenVino
from workloads import Words, Workload, chosen

from qwen_rerank.scorers.qwen.device import activation_bytes


def main() -> int:
    """Take a turn."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    options = argparse.Namespace(**json.loads((folder / "asked.json").read_text(encoding="utf-8")))
    options.tokenizer = Path(options.tokenizer)
    torch.set_num_threads(options.threads) if options.threads else None
    words = Words(options.tokenizer, seed=1)
    try:
        contestant = made(name, folder, options)
        contestant.score(words.texts(12), [words.texts(16, 24)])  # what it does only once
        take_turn(name, contestant, words, folder / f"{name}.json", options)
    except Exception as exc:  # each peer fails in its own way, and none may cost the others' figures
        (folder / f"{name}.error").write_text(f"{type(exc).__name__}: {exc}", encoding="utf-8")
        return 1
    return 0


def take_turn(name: str, contestant: Contestant, words: Words, answer: Path, options: argparse.Namespace) -> None:
    """Run the workloads, and write what was found after each, together with that of earlier turns."""
    first_turn = not answer.exists()
    found = {"workloads": {}} if first_turn else json.loads(answer.read_text(encoding="utf-8"))
    found["settings"] = contestant.settings()
    for workload in chosen(options, Words(options.tokenizer)):
        one = found["workloads"].setdefault(workload.name, {"seconds": [], "tried": {}, "peak_bytes": None})
        measured(name, contestant, workload, one, options)
        write(found, answer)
    if isinstance(contestant, Engine) and name == "engine" and first_turn:
        found["engine"] = of_engine(contestant, words, options)
        write(found, answer)


def write(found: dict[str, Any], answer: Path) -> None:
    """Replace the answer as a whole."""
    unfinished = answer.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(answer)


def made(name: str, folder: Path, options: argparse.Namespace) -> Contestant:
    """Return a contestant with the random model. What it converts is kept in the folder for its next turn."""
    on_cpu, tokenizer, threads = options.device == "cpu", options.tokenizer, torch.get_num_threads()
    model = random_model(
        model_config(options.size, layers=options.layers), dtype=getattr(torch, options.dtype), device=options.device
    )
    batch_sizes = (1, 2, 4, 8, 16, 32) if on_cpu else (32, 64, 128)
    engine = {"device": options.device, "dtype": options.dtype, "max_length": 16_384}
    vllm = {"max_length": 16_384, "enforce_eager": options.vllm_eager, "block_size": options.vllm_block_size}
    padded = {"folder": folder / name, "threads": threads, "batch_sizes": batch_sizes[:4]}
    match name:
        case "recipe":
            return Recipe(model, tokenizer, batch_size=8, last_only=False)
        case "recipe-last":
            return Recipe(model, tokenizer, batch_size=options.batch_size or (8 if on_cpu else 32), last_only=True)
        case "sentence-transformers":
            return SentenceTransformers(model, tokenizer, batch_sizes=batch_sizes, tried=16 if on_cpu else 200)
        case "engine":
            return Engine(model, tokenizer, **engine)
        case "engine-deterministic":
            return Engine(model, tokenizer, **engine, deterministic=True)
        case "engine-float32":
            return Engine(model, tokenizer, **{**engine, "dtype": "float32"})
        case "engine-int8":
            return Engine(model, tokenizer, **engine, quantize="int8")
        case "engine-int8-outliers":
            return Engine(model, tokenizer, **engine, quantize="int8", outliers=True)
        case "vllm":
            return Vllm(model, tokenizer, folder=folder / name, dtype=options.dtype, **vllm)
        case "vllm-float32":
            return Vllm(model, tokenizer, folder=folder / name, dtype="float32", **vllm)
        case "vllm-int8":
            return Vllm(model, tokenizer, folder=folder / name, dtype=options.dtype, int8=True, **vllm)
        case "openvino-int8":
            return OpenVino(model, tokenizer, **padded)
        case "onnxruntime-int8":
            return OnnxRuntime(model, tokenizer, **padded)
        case "llama-q8":
            modules = Path(options.node_modules) if options.node_modules else None
            return LlamaCpp(model, tokenizer, folder=folder / name, node_modules=modules, threads=threads)
    raise ValueError(f"There is no contestant {name}.")


def measured(name: str, contestant: Contestant, workload: Workload, one: dict, options: argparse.Namespace) -> None:
    """Time a workload, and add what was found to that of earlier turns."""
    one["tried"] = contestant.tune(workload.queries, workload.documents, one["tried"])

    def score() -> None:
        scores = contestant.score(workload.queries, workload.documents)
        one["scores"] = np.concatenate(scores).astype(float).tolist()

    for _ in range(options.rounds or workload.rounds):
        contestant.forget()
        with PeakMemory(options.device) as peak:
            one["seconds"].append(round(timed(score, options.device), 4))
        if contestant.in_process:
            one["peak_bytes"] = max(one["peak_bytes"] or 0, peak.bytes)
        print(f"{workload.name:40} {name:24} {one['seconds'][-1]:8.3f} s", file=sys.stderr, flush=True)


def of_engine(engine: Engine, words: Words, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is asked of the engine alone: its memory budget, and how it bears many callers."""
    budget = engine.scorer.token_budget
    found: dict[str, Any] = {
        "token_budget": budget,
        "budget_bytes": budget * activation_bytes(engine.config, getattr(torch, options.dtype)),
        "weight_bytes": engine.weight_bytes,
    }
    if not options.quick and not options.formats:
        found["callers"] = callers(engine, words, small=options.device == "cpu")
        if options.device.startswith("cuda"):
            found["queue"] = asyncio.run(queue(engine, words))
    return found


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


if __name__ == "__main__":
    sys.exit(main())
