"""`qwen-rerank doctor`: what is installed, what this machine can run, and what to type next."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

# Parameters of the published checkpoints (their safetensors indices).
MODELS = {
    "Qwen/Qwen3-Reranker-0.6B": 595_776_512,
    "Qwen/Qwen3-Reranker-4B": 4_021_784_576,
    "Qwen/Qwen3-Reranker-8B": 8_188_548_096,
}
_ROOM_BYTES = 2 * 1024**3  # beside the weights: activations of one pack, the CUDA context, the tokenizer

EXTRAS = {
    "dense": ("sentence-transformers",),
    "lexical": ("bm25s",),
    "langchain": ("langchain-core",),
    "llama-index": ("llama-index-core",),
    "serve": ("fastapi", "uvicorn", "prometheus-client"),
    "client": ("httpx2",),
    "eval": ("ir-measures", "scipy", "scikit-learn", "matplotlib"),
    "train": ("sentence-transformers", "datasets", "accelerate", "peft"),
}

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was looked at, what was seen, and the cure where one is needed."""

    level: Level
    subject: str
    seen: str
    cure: str = ""


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(doctor)
    app.command("help")(help_page)


def help_page(
    topic: Annotated[
        str | None, typer.Argument(help="A topic of the page; all of them are listed without one.")
    ] = None,
    zh: Annotated[bool, typer.Option("--zh", help="中文")] = False,
) -> None:
    """Print a section of the troubleshooting page: what goes wrong, why, and the cure."""
    from rich.markdown import Markdown

    from qwen_rerank.checks import check_choice
    from qwen_rerank.cli.show import console
    from qwen_rerank.help import sections

    page = sections("zh" if zh else "en")
    if topic is None:
        for name, text in page.items():
            console.print(f"  qwen-rerank help {name:<10} {text.splitlines()[0].strip('*')}", highlight=False)
        return
    console.print(Markdown(page[check_choice("topic", topic, tuple(page))]))


def doctor() -> None:
    """Say what is installed, what this machine can run, and what to type next; exit 1 if something is broken."""
    from qwen_rerank.cli.show import console

    marks = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "problem": "[red]✗[/]"}
    findings = examine()
    for finding in findings:
        console.print(f"{marks[finding.level]} [bold]{finding.subject}[/]: {escape(finding.seen)}", highlight=False)
        if finding.cure:
            console.print(f"    {escape(finding.cure)}", highlight=False)
    console.print("\nSomething wrong? qwen-rerank help", highlight=False)
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


def examine() -> list[Finding]:
    """Return every finding, in the order in which one would mend them."""
    return [
        _python(),
        *_core(),
        *_faiss(installed_version("faiss-cpu"), installed_version("faiss-gpu")),
        *_extras(),
        *_hardware(),
        _hub(),
    ]


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    seen = f"{platform.python_version()} on {platform.system()} {platform.machine()}, SQLite {sqlite3.sqlite_version}"
    return Finding("ok", "Python", seen)


def _core() -> list[Finding]:
    findings = []
    for name in ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub"):
        version = installed_version(name)
        if version is None:
            findings.append(Finding("problem", name, "not installed", "pip install --force-reinstall qwen-rerank"))
        else:
            findings.append(Finding("ok", name, version))
    return findings


def _faiss(cpu: str | None, gpu: str | None) -> list[Finding]:
    if cpu and gpu:
        cure = "pip uninstall -y faiss-cpu faiss-gpu, then install one: pip install 'qwen-rerank[faiss-cpu]'"
        return [Finding("problem", "faiss", f"faiss-cpu {cpu} and faiss-gpu {gpu} overwrite each other's files", cure)]
    if not cpu and not gpu:
        return [Finding("note", "faiss", "not installed: no FaissStore", "pip install 'qwen-rerank[faiss-cpu]'")]
    try:
        import faiss

        seen = f"faiss-{'cpu' if cpu else 'gpu'} {faiss.__version__}, {faiss.get_num_gpus()} GPUs"
    except (ImportError, AttributeError) as exc:
        cure = "pip uninstall -y faiss-cpu faiss-gpu, then pip install 'qwen-rerank[faiss-cpu]'"
        return [Finding("problem", "faiss", f"installed, but broken ({exc})", cure)]
    return [Finding("ok", "faiss", seen)]


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if installed_version(name) is None]
        if missing:
            cure = f"pip install 'qwen-rerank[{extra}]'"
            findings.append(Finding("note", f"extra {extra}", f"without {', '.join(missing)}", cure))
        else:
            findings.append(Finding("ok", f"extra {extra}", "complete"))
    return findings


def _hardware() -> list[Finding]:
    try:
        import torch
    except ImportError as exc:
        return [Finding("problem", "torch", f"cannot be imported ({exc})", "pip install --force-reinstall torch")]
    if not torch.cuda.is_available():
        return [_cpu_only(cuda_build=torch.version.cuda), _fitting("memory", _memory_bytes(), bytes_per_weight=4)]
    findings = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        findings.append(
            Finding("ok", f"cuda:{number}", f"{properties.name}, {properties.total_memory / 1024**3:.0f} GiB")
        )
        findings.append(_fitting(f"cuda:{number}", properties.total_memory, bytes_per_weight=2))
    return findings


def _cpu_only(*, cuda_build: str | None) -> Finding:
    seen = f"{os.cpu_count()} CPU cores, no CUDA device"
    if cuda_build is None:
        return Finding(
            "note", "device", f"{seen}; this torch has no CUDA", "with an NVIDIA GPU: install torch's CUDA build"
        )
    return Finding(
        "note", "device", f"{seen}, though torch is built for CUDA {cuda_build}", "see nvidia-smi: driver missing?"
    )


def _fitting(where: str, n_bytes: int | None, *, bytes_per_weight: int) -> Finding:
    """Say which published model fits into `n_bytes`, weights and working room together."""
    subject = f"models for {where}"
    if n_bytes is None:
        return Finding("note", subject, "the size of the memory is unknown here")
    fits = [name for name, n in MODELS.items() if n * bytes_per_weight + _ROOM_BYTES <= n_bytes]
    if not fits:
        return Finding("note", subject, "none of the published sizes fits", "try: qwen-rerank demo")
    return Finding(
        "ok", subject, f"up to {fits[-1]}", f"try: qwen-rerank demo --model {fits[-1 if bytes_per_weight == 2 else 0]}"
    )


def _memory_bytes() -> int | None:
    """Return the machine's memory, the container's limit counted where there is one."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _hub() -> Finding:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cached = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*Qwen3-Reranker*"))
    if constants.HF_HUB_OFFLINE:
        cure = "unset HF_HUB_OFFLINE to download, or give --model a folder" if not cached else ""
        return Finding(
            "note", "model hub", f"offline by HF_HUB_OFFLINE; in the cache: {', '.join(cached) or 'no reranker'}", cure
        )
    return Finding(
        "ok", "model hub", f"in the cache: {', '.join(cached) or 'no reranker yet; it is downloaded on first use'}"
    )
