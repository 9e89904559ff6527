"""`qwen-rerank doctor`: what is installed, what this machine can run, and what to type next."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from qwen_rerank.extras import EXTRAS, installed_version, memory_bytes, pip_line

# Parameters of the published checkpoints (their safetensors indices).
MODELS = {
    "Qwen/Qwen3-Reranker-0.6B": 595_776_512,
    "Qwen/Qwen3-Reranker-4B": 4_021_784_576,
    "Qwen/Qwen3-Reranker-8B": 8_188_548_096,
}
_BYTES = {"bfloat16": 2, "float32": 4}
_ROOM_BYTES = 2 * 1024**3  # beside the weights: activations of one pack, the CUDA context, the tokenizer

_NEXT = """\
Both rounds on texts that come with the package:  qwen-rerank demo
Your own files:                                   qwen-rerank index FOLDER --store my-store --embedder mini
Something does not work:                          qwen-rerank help"""

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Observation:
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
            console.print(f"    {escape(finding.cure)}", highlight=False, soft_wrap=True)
    console.print(f"\n{_NEXT}", highlight=False, markup=False, soft_wrap=True)
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


def examine() -> list[Observation]:
    """Return every finding, in the order in which one would mend them."""
    from qwen_rerank.store.faiss_build import faiss_wheels

    return [
        _python(),
        *_core(),
        *_faiss(faiss_wheels()),
        *_extras(),
        *_hardware(),
        _hub(),
    ]


def _python() -> Observation:
    seen = f"{platform.python_version()} on {platform.system()} {platform.machine()}, SQLite {sqlite3.sqlite_version}"
    return Observation("ok", "Python", seen)


def _core() -> list[Observation]:
    findings = []
    for name in ("tokenizers", "safetensors", "huggingface-hub"):
        version = installed_version(name)
        if version is None:
            findings.append(Observation("problem", name, "not installed", f"pip install {name}"))
        else:
            findings.append(Observation("ok", name, version))
    return findings


def _faiss(wheels: Mapping[str, str]) -> list[Observation]:
    """Say which FAISS is there, given the installed wheels with their versions."""
    if len(wheels) > 1:
        named = " and ".join(f"{name} {version}" for name, version in wheels.items())
        cure = f"pip uninstall -y {' '.join(wheels)}, then install one: {pip_line('faiss-cpu')}"
        return [Observation("problem", "faiss", f"{named} overwrite each other's files", cure)]
    if not wheels:
        return [Observation("note", "faiss", "not installed: no FaissStore", pip_line("faiss-cpu"))]
    [(name, version)] = wheels.items()
    try:
        import faiss

        from qwen_rerank.store.faiss_build import gpu_or_reason

        reason = gpu_or_reason(faiss)[1]
    except (ImportError, AttributeError) as exc:
        cure = f"pip uninstall -y {name}, then {pip_line('faiss-cpu')}"
        return [Observation("problem", "faiss", f"{name} {version} is installed, but broken ({exc})", cure)]
    return [Observation("ok", "faiss", f"{name} {version}, searches on the {f'CPU: {reason}' if reason else 'GPU'}")]


def _extras() -> list[Observation]:
    lacks = {
        extra: [name for name in packages if installed_version(name) is None] for extra, packages in EXTRAS.items()
    }
    complete = [extra for extra, missing in lacks.items() if not missing]
    findings = [Observation("ok", "extras", f"complete: {', '.join(complete)}")] if complete else []
    for extra, missing in lacks.items():
        if missing:
            findings.append(Observation("note", f"extra {extra}", f"not there: {', '.join(missing)}", pip_line(extra)))
    return findings


def _hardware() -> list[Observation]:
    version = installed_version("torch")
    if version is None:
        seen = "no Qwen3-Reranker without torch; mini scores here (--model mini), or a server does (--server URL)"
        return [Observation("note", "largest model", seen)]
    try:
        import torch
    except (ImportError, OSError) as exc:
        return [Observation("problem", "torch", f"cannot be imported ({exc})", "pip install --force-reinstall torch")]
    from qwen_rerank.scorers.qwen.device import bfloat16_instructions

    findings = [Observation("ok", "torch", version)]
    if not torch.cuda.is_available():
        return [
            *findings,
            _cpu_only(cuda_build=torch.version.cuda),
            _cpu_formats(),
            _fitting("memory", memory_bytes(), dtype="bfloat16" if bfloat16_instructions() else "float32"),
        ]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        findings.append(Observation("ok", f"cuda:{number}", properties.name))
        findings.append(_fitting(f"cuda:{number}", properties.total_memory, dtype="bfloat16"))
    return findings


def _cpu_only(*, cuda_build: str | None) -> Observation:
    seen = f"{os.cpu_count()} CPU cores, no CUDA device"
    if cuda_build is None:
        return Observation(
            "note",
            "device",
            f"{seen}; this torch has no CUDA",
            "with an NVIDIA GPU: install torch's CUDA build (qwen-rerank help slow)",
        )
    return Observation(
        "note",
        "device",
        f"{seen}, though torch is built for CUDA {cuda_build}",
        "type nvidia-smi: without a list of GPUs the driver is missing or too old",
    )


def _cpu_formats() -> Observation:
    """Say in which number formats this CPU computes fast, and which one `dtype="auto"` takes."""
    from qwen_rerank.scorers.qwen.device import bfloat16_instructions
    from qwen_rerank.scorers.qwen.quantization import int8_works

    name = bfloat16_instructions()
    auto = (
        f"bfloat16 by {name}, which dtype='auto' takes for checkpoints stored so"
        if name
        else "no instructions for bfloat16, so dtype='auto' takes float32"
    )
    return Observation("ok", "CPU formats", f"{auto}; quantize='int8' {'can' if int8_works() else 'cannot'} be used")


def _fitting(where: str, n_bytes: int | None, *, dtype: str) -> Observation:
    """Say which published model fits into `n_bytes`, weights and working room together."""
    subject = "largest model"
    if n_bytes is None:
        return Observation("note", subject, f"the size of {where} is unknown here")
    room = f"{where} ({n_bytes / 1024**3:.0f} GiB) in {dtype}"
    fits = [name for name, n in MODELS.items() if n * _BYTES[dtype] + _ROOM_BYTES <= n_bytes]
    if not fits:
        return Observation("note", subject, f"none of the published ones fits {room}", "try: qwen-rerank demo")
    # A larger one would fit a CPU's memory, but not the patience of who waits for it.
    name = fits[0] if where == "memory" else fits[-1]
    return Observation("ok", subject, f"{fits[-1]} fits {room}", f"try: qwen-rerank demo --model {name}")


def _hub() -> Observation:
    from qwen_rerank.models.names import why_no_hub

    try:
        from huggingface_hub import constants
    except ImportError as exc:
        cure = "pip install --force-reinstall huggingface-hub"
        return Observation("problem", "model hub", f"its client cannot be imported ({exc})", cure)
    cache = Path(constants.HF_HUB_CACHE)
    found = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*Qwen3-Reranker*"))
    cached = f"in the cache: {', '.join(found) or 'no Qwen3-Reranker'}"
    if constants.HF_HUB_OFFLINE:
        cure = "" if found else "unset HF_HUB_OFFLINE to download, or give --model a folder (qwen-rerank help hub)"
        return Observation("note", "model hub", f"offline by HF_HUB_OFFLINE; {cached}", cure)
    if (reason := why_no_hub(timeout_s=2.0)) is not None:
        cure = "a mirror: export HF_ENDPOINT=https://…; without any: --model mini, or a folder (qwen-rerank help hub)"
        return Observation("note", "model hub", f"cannot be reached ({reason}); {cached}", cure)
    return Observation("ok", "model hub", f"{constants.ENDPOINT}; {cached}", "" if found else "downloaded on first use")
