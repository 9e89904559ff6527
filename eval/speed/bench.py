"""Speed of the engine beside the official recipe, sentence-transformers, vLLM and peers in 8 bits, on one model, in turn.

    python eval/speed/bench.py --tokenizer FOLDER [--device cuda] [--size 0.6B] [--out results.json]
    python eval/speed/bench.py --tokenizer FOLDER --device cpu --dtype bfloat16 --formats   # float32, bfloat16 and int8

Random weights of the true shape: speed does not depend on their values. Each contestant has the machine to itself, in a
process of its own (`alone.py`); all take one of `--turns` turns, then all the next, and the best run of each counts, so that
a machine whose speed wavers slows all of them alike. Exits with 1 when scores disagree, or the engine has none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from contestants import model_config, shape_of
from measure import computed_tokens, groups_of, hardware, matmul_peak, useful_flops, versions
from report import table, write_plot
from workloads import ALL, Words, Workload, chosen

from qwen_rerank.prompt import PromptEncoder, PromptTokenizer
from qwen_rerank.scorers.qwen.scorer import shared_prefix_of

# Largest difference of log-odds between contestants that rounding explains, at these random weights.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}
# Contestants in a number format of their own, whose scores are meant to differ.
FORMATS = {
    "engine-float32": "float32",
    "vllm-float32": "float32",
    "engine-int8": "int8",
    "engine-int8-outliers": "int8",
    "vllm-int8": "int8",
    "openvino-int8": "int8",
    "onnxruntime-int8": "int8",
    "llama-q8": "int8",
}
# Formats whose bars are of these workloads, and the peer that takes half a minute for a query.
ONLY_ON = {
    "engine-float32": ("1x16x128", "1x2x2000"),
    "vllm-float32": ("1x2x2000",),
    "engine-int8-outliers": ("1x16x128",),
    "llama-q8": ("1x16x128",),
}


def main() -> int:
    """Run the benchmark."""
    options = parse()
    torch.set_num_threads(options.threads) if options.threads else None
    machine = hardware(options.device)  # now: its load is that of others
    encoder = PromptEncoder(PromptTokenizer((options.tokenizer / "tokenizer.json").read_text(encoding="utf-8")))
    workloads = chosen(options, Words(options.tokenizer))
    sizes = {workload.name: sizes_of(workload, encoder, options) for workload in workloads}
    names = contestants(options)
    formats = sorted({options.dtype, *(FORMATS[name] for name in names if name in FORMATS)})
    report = header(options, machine)
    report["peak_flops_before"] = report["peak_flops_after"] = peaks(formats, options.device)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for name in names:
                theirs = [w.name for w in workloads if runs(name, w)]
                if (
                    theirs
                    and name not in report["not_run"]
                    and (why := taken_turn(name, theirs, Path(folder), options))
                ):
                    report["not_run"][name] = f"turn {turn + 1}: {why}"
                collect(report, sizes, Path(folder), options)
                finish(report, options)
            print(f"turn {turn + 1} of {options.turns} is over", file=sys.stderr, flush=True)
    report["peak_flops_after"] = peaks(formats, options.device)
    finish(report, options)
    print(table(report))
    write_plot(report, options.out.with_suffix(".png"))
    return 0 if report["scores_agree"] and "engine" not in report["not_run"] else 1


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
    parser.add_argument("--only", nargs="*", help="contestants to run beside the engine")
    parser.add_argument("--turns", type=int, default=2, help="of each contestant, a process each")
    parser.add_argument("--rounds", type=int, help="of each workload in a turn; 1 to 10 by the workload without it")
    parser.add_argument("--workloads", nargs="*", help="names of workloads, by their beginnings")
    parser.add_argument(
        "--formats",
        action="store_true",
        help="on a CPU also the engine in float32 and in int8, plain and with planted outliers, and peers in 8 bits",
    )
    parser.add_argument("--node-modules", type=Path, help="folder with node-llama-cpp, for llama.cpp")
    parser.add_argument("--quick", action="store_true", help="seconds of work, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    options.formats = options.formats and options.device == "cpu"
    if unknown := set(options.only or ()) - {*ALL, "engine-deterministic", *(FORMATS if options.formats else ())}:
        parser.error(f"no such contestant here: {', '.join(sorted(unknown))} (other formats need --formats, on a CPU)")
    return options


def contestants(options: argparse.Namespace) -> list[str]:
    """Return the names of those asked for."""
    names = [*ALL, "engine-deterministic", *(FORMATS if options.formats else ())]
    return [name for name in names if not options.only or name in (*options.only, "engine")]


def runs(name: str, workload: Workload) -> bool:
    """Say whether a contestant runs a workload. The other formats run what vLLM runs, or what their bars are of."""
    if name in FORMATS:
        return workload.name in ONLY_ON[name] if name in ONLY_ON else "vllm" in workload.engines
    return name in workload.engines


def taken_turn(name: str, workloads: Sequence[str], folder: Path, options: argparse.Namespace) -> str:
    """Let one contestant run its workloads in a process of its own; return why it could not, or nothing.

    What it found is in `<name>.json` of the folder, together with that of earlier turns.
    """
    asked = {**vars(options), "workloads": list(workloads)}
    (folder / "asked.json").write_text(json.dumps(asked, default=str), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("alone.py")), name, str(folder)]
    process = subprocess.Popen(command, env={**os.environ, **environment(options)}, start_new_session=True)
    try:
        code = process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a contestant started and left behind, and itself on Ctrl-C
    if code == 0:
        return ""
    why = folder / f"{name}.error"
    reason = why.read_text(encoding="utf-8") if why.exists() else f"its process ended with {code}"
    print(f"{name}: not measured ({reason})", file=sys.stderr)
    return reason


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return what contestants find in their environment beside what the user set. On a CPU vLLM takes one core of two for its
    scheduler where it is not told otherwise.
    """
    threads = options.threads or os.cpu_count() or 1
    return {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get(
            "VLLM_CPU_KVCACHE_SPACE", "4"
        ),  # GiB, room for every prompt of a workload
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(threads))),
        **({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}),
    }


def collect(report: dict[str, Any], sizes: dict[str, dict], folder: Path, options: argparse.Namespace) -> None:
    """Write into the report what the contestants have found so far."""
    found = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
             for name in contestants(options) if (folder / f"{name}.json").exists()}  # fmt: skip
    for name, one in found.items():
        report["settings"]["contestants"][name] = one["settings"]
        report |= one["engine"] if name == "engine" else {}
    for workload, size in sizes.items():
        ran = {name: one["workloads"][workload] for name, one in found.items() if workload in one["workloads"]}
        if ran:
            report["workloads"][workload] = {**size, "contestants": figures(size, ran)}


def sizes_of(workload: Workload, encoder: PromptEncoder, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a workload asks for: texts, tokens, and the floating-point work that its scores need."""
    shared_prefix = shared_prefix_of(encoder, None) if options.device == "cpu" else None
    groups = groups_of(encoder, workload.queries, workload.documents, shared_prefix=shared_prefix)
    return {
        "queries": len(workload.queries),
        "documents": workload.n_documents,
        "tokens": sum(len(group.prefix) * len(group.documents) + sum(map(len, group.documents)) for group in groups),
        "tokens_after_sharing": computed_tokens(groups),
        "useful_flops": useful_flops(groups, shape_of(model_config(options.size, layers=options.layers))),
    }


def figures(size: dict[str, Any], ran: dict[str, dict]) -> dict[str, Any]:
    """Return each contestant's figures of one workload."""
    first = np.array(next(iter(ran.values()))["scores"])
    return {
        name: {
            "seconds": one["seconds"],
            "documents_per_s": size["documents"] / min(one["seconds"]),
            "ms_p50": 1e3 * float(np.percentile(one["seconds"], 50)) / size["queries"],
            **(
                {"ms_p95": 1e3 * float(np.percentile(one["seconds"], 95)) / size["queries"]}
                if len(one["seconds"]) >= 10
                else {}
            ),
            "peak_bytes_beside_weights": one["peak_bytes"],
            "flops_per_s": size["useful_flops"] / min(one["seconds"]),
            "largest_difference": float(np.abs(np.array(one["scores"]) - first).max()),
            **({"seconds_by_batch_size": one["tried"]} if one["tried"] else {}),
        }
        for name, one in ran.items()
    }


def header(options: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Return what the figures hold for."""
    layers = model_config(options.size, layers=options.layers).num_hidden_layers
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"Qwen3-Reranker-{options.size} shape, {layers} layers, random weights",
        "device": options.device,
        "dtype": options.dtype,
        "hardware": machine,
        "versions": versions(),
        "settings": {
            "turns": options.turns,
            "recipe": "batches of 8",
            "sentence-transformers": "the fastest of the batch sizes tried, see seconds_by_batch_size",
            "vllm": {"eager": options.vllm_eager, "block_size": options.vllm_block_size},
            "environment": environment(options),
            "contestants": {},
        },
        "not_run": {},
        "workloads": {},
    }


def peaks(formats: Sequence[str], device: str) -> dict[str, float]:
    """Return the matmul peak of every number format that a contestant computes in."""
    found = {name: matmul_peak(device, getattr(torch, name)) for name in formats}
    torch.cuda.empty_cache()  # contestants have the device to themselves
    return found


def finish(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Add what follows from the figures, and write them; also half-way, so that an interrupted run leaves what it has."""
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
    report["largest_difference"] = max(differences, default=None)
    report["scores_agree"] = bool(differences) and all(d <= TOLERANCE[report["dtype"]] for d in differences)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
