"""The device, its number format, and the tokens that a batch may hold there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from threading import Barrier, Lock
from typing import TYPE_CHECKING, TypeVar

import torch

from qwen_rerank.errors import DeviceOutOfMemoryError, InvalidInputError
from qwen_rerank.scorers.qwen.scheduler import DeviceLostError
from qwen_rerank.sharing import check_gpu_after_fork

if TYPE_CHECKING:
    from qwen_rerank.scorers.qwen.config import QwenModelConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Above this a batch gains no speed: on the CPU a matrix product of 2,048 rows already runs at its peak, and a short batch
# lets a small call through sooner.
CPU_BATCH = 2048
CUDA_BATCH = 32_768
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SMALLEST_BATCH = 256
_MEMORY_SHARE = 0.25  # of the free memory of a CPU, which others use too
_CUDA_SHARE = 0.8  # of the free memory of a GPU; the rest is for fragments and for attention over long documents
_TRIALS = (1024, 4096)  # tokens


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first CUDA device that PyTorch can use, else the CPU.

    Raises:
        InvalidInputError: If PyTorch knows no such device here.
    """
    if name != "cpu":
        check_gpu_after_fork()
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise InvalidInputError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {name!r}.") from exc
    if device.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {name!r}.")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise InvalidInputError(
            f"device {name!r} is not there: PyTorch {torch.__version__} sees {count} CUDA devices; use device='cpu', or "
            "install the CUDA build of PyTorch."
        )
    return torch.device("cuda", device.index or 0)


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of that name.

    "auto" is bfloat16 on CUDA (float16 before Ampere, where bfloat16 is emulated). On the CPU it is float32, except for
    a checkpoint stored in bfloat16 on a CPU with instructions for it. Never by timing: replicas must agree.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if stored == torch.bfloat16 and bfloat16_instructions() else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Return the name by which users call a dtype."""
    return str(dtype).removeprefix("torch.")


def bfloat16_instructions() -> str | None:
    """Return the name of this CPU's instructions for products in bfloat16, or None; without them it is emulated."""
    probe = getattr(torch.cpu, "get_capabilities", None)  # of a newer PyTorch; absence only costs speed
    capabilities: dict[str, object] = probe() if probe else {}
    for name in ("amx_bf16", "avx512_bf16", "arm_bf16", "bf16"):
        if capabilities.get(name):
            return name.upper()
    return None


def activation_bytes(config: QwenModelConfig, dtype: torch.dtype) -> int:
    """Return an upper estimate of the bytes that one row of a batch takes beside the weights."""
    heads = (2 * config.n_heads + 3 * config.n_kv_heads) * config.head_dim
    return dtype.itemsize * (4 * config.hidden_size + 2 * heads + config.intermediate_size)


def cpu_budget(config: QwenModelConfig, dtype: torch.dtype, *, max_length: int) -> int:
    """Return the tokens of a batch on the CPU: enough for full speed, within a share of the free memory."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30
    affordable = int(free * _MEMORY_SHARE) // activation_bytes(config, dtype)
    return max(_SMALLEST_BATCH, min(max(CPU_BATCH, max_length // 2), affordable))


@contextmanager
def on_device(device: torch.device, *, threads: int | None = None) -> Iterator[None]:
    """Make this the current device, which Triton launches on, and set how many threads a CPU's operations take.

    Each thread has its own of both. The number of threads stays: it is what later threads of the process begin with.
    """
    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


class Crew:
    """Threads that compute side by side, each with a part of the threads that PyTorch's operations take."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._size = self._threads_each = 0
        self._preparing = Lock()

    def run(self, works: Sequence[Callable[[], T]], *, threads_each: int) -> list[T]:
        """Return what each work returns, in order, with so many threads for each operation of a work.

        Raises:
            Exception: The first work's that fails, in their order, once all have ended.
        """
        n_threads = torch.get_num_threads()
        if len(works) == 1 and threads_each == n_threads:
            return [works[0]()]
        futures: list[Future[T]] = []
        with suppress(RuntimeError):  # no thread can be begun, as while the interpreter is shutting down
            pool = self._prepared(threads_each, n_threads)
            for work in works:
                futures.append(pool.submit(work))
        wait(futures)
        found = [future.result() for future in futures]
        try:
            return found + [_with_threads(threads_each, work) for work in works[len(futures) :]]
        finally:
            if len(found) < len(works):
                torch.set_num_threads(n_threads)

    def close(self) -> None:
        """End the threads; a later run begins new ones."""
        with self._preparing:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def _prepared(self, threads_each: int, n_threads: int) -> ThreadPoolExecutor:
        """Return the pool, every thread of which has set its own number.

        They all do before any computes: what is set last is also what every later thread of the process begins with, so
        it is put back at once.

        Raises:
            RuntimeError: If a thread cannot be begun.
        """
        with self._preparing:
            if self._pool is not None and self._threads_each == threads_each:
                return self._pool
            size = n_threads if self._pool is None else self._size
            pool = self._pool or ThreadPoolExecutor(size, thread_name_prefix="qwen-rerank-share")
            meeting = Barrier(size)  # so that each thread takes one
            try:
                ready = [pool.submit(_with_threads, threads_each, meeting.wait) for _ in range(size)]
                wait(ready)
            except RuntimeError:
                meeting.abort()
                self._pool = None
                pool.shutdown()
                raise
            finally:
                torch.set_num_threads(n_threads)
            self._pool, self._size, self._threads_each = pool, size, threads_each
            return pool


def _with_threads(n_threads: int, work: Callable[[], T]) -> T:
    """Return what the work returns, with so many threads for each operation of this thread."""
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)
    return work()


def cap_process(device: torch.device, gb: float) -> None:
    """Let PyTorch take at most `gb` GiB of this device in this process; more is an out-of-memory error."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gb * 2**30 / total), device)


def cuda_budget(run: Callable[[int], None], device: torch.device, *, cap_gb: float | None) -> int:
    """Return the tokens of a batch that the free memory holds, by what two trial batches took.

    Args:
        run: Computes a batch of about that many tokens.
        device: The CUDA device.
        cap_gb: GiB that the process may take; None leaves what is free on the device.
    """
    run(_TRIALS[0])  # the first pass also allocates what stays, such as workspaces
    peaks = []
    for tokens in _TRIALS:
        torch.cuda.reset_peak_memory_stats(device)
        run(tokens)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
    per_token = max(1, (peaks[1] - peaks[0]) // (_TRIALS[1] - _TRIALS[0]))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    if cap_gb is not None:
        free = min(free, int(cap_gb * 2**30) - torch.cuda.memory_reserved(device))
    budget = min(CUDA_BATCH, int(free * _CUDA_SHARE) // per_token)
    logger.info("%d bytes a token and %d held on %s: batches of %d tokens.", per_token, held, device, budget)
    return max(_SMALLEST_BATCH, budget)


def as_our_error(exc: Exception) -> Exception:
    """Return PyTorch's error as one of ours where it says something about the device, else unchanged."""
    text = str(exc)
    if isinstance(exc, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return DeviceOutOfMemoryError(f"the device ran out of memory ({_first_line(text)}).")
    lost = getattr(torch, "AcceleratorError", ())
    if isinstance(exc, lost) or "CUDA error" in text:
        return DeviceLostError(
            f"the CUDA device failed ({_first_line(text)}); this process cannot use it any more, so restart it."
        )
    return exc


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no reason given"
