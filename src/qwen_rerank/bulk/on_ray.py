"""Workers on Ray: a pipeline of Ray Data over the blocks, with a pool of actors that hold a model each."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, cast

from qwen_rerank.bulk.blocks import Block
from qwen_rerank.bulk.driver import Workers
from qwen_rerank.bulk.work import BlockWorker, BulkTask, PartEntry
from qwen_rerank.errors import JobError, MissingExtraError, RerankError

# Before Ray is imported: a job sends nothing about itself to anybody unless its user asks for that.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError
except ImportError as exc:
    raise MissingExtraError("workers on Ray", package="ray", extra="ray", cause=exc) from exc


class _Actor:
    """A worker's process: the model is loaded when it starts."""

    def __init__(self, task: BulkTask[Any]) -> None:
        self._worker = BlockWorker(task)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """Return the entry of a block."""
        return asdict(self._worker.do(Block(**block)))


class _RayExecutor:
    """Has blocks done by a pool of actors.

    Args:
        task: The work.
        workers: The pool.
    """

    def __init__(self, task: BulkTask[Any], workers: Workers) -> None:
        self._task = task
        self._workers = workers
        # Asked of a worker: the driver may have neither the memory nor the GPU for the model.
        ask = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=workers.retries)(_fingerprint)
        with _explained():
            self.fingerprint: str = ray.get(ask.remote(task))

    def map(self, blocks: Sequence[Block]) -> Iterator[PartEntry]:
        """Yield entries as blocks are done; Ray holds back what would wait, and does a dead worker's blocks again."""
        workers = self._workers
        DataContext.get_current().raise_original_map_exception = True
        # A task a block, so that each can be written into the manifest as soon as it is done.
        pipeline: ray.data.Dataset = ray.data.from_items(
            [asdict(block) for block in blocks], override_num_blocks=len(blocks)
        )
        with warnings.catch_warnings():
            # Announced for Ray 2.64, with nothing yet to bound retries by in its place; hence the bound of the extra.
            warnings.simplefilter("ignore", DeprecationWarning)
            pipeline = pipeline.map(
                cast("Any", _Actor),
                fn_constructor_args=(self._task,),
                compute=ActorPoolStrategy(size=min(workers.count, len(blocks))),
                num_cpus=workers.cpus,
                num_gpus=workers.gpus,
                ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": workers.retries},
            )
        with _explained():
            for row in pipeline.iter_rows():
                yield PartEntry(**row)


def _fingerprint(task: BulkTask[Any]) -> str:
    return BlockWorker(task).fingerprint


@contextmanager
def ray_executor(task: BulkTask[Any], workers: Workers) -> Iterator[_RayExecutor]:
    """Give an executor on the cluster that runs, or on one of this job's own that ends with it."""
    own = not ray.is_initialized()
    if own:
        _start(workers)
    try:
        yield _RayExecutor(task, workers)
    finally:
        if own:
            ray.shutdown()


def _start(workers: Workers) -> None:
    address = workers.address or os.environ.get("RAY_ADDRESS")
    here: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        # "local": without an address Ray joins whatever cluster was started last on this machine, by anybody, and the
        # task with what its function holds would go there.
        ray.init(address or "local", log_to_driver=False, logging_level=logging.WARNING, **here)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise JobError(f"no Ray at {address or 'this machine'} ({exc}); start one, or give its address.") from exc
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # what ends the job is told, and the driver has its own bar
    DataContext.get_current().enable_progress_bars = False


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what Ray raises into our own error where a worker raised it, and else into a sentence."""
    try:
        yield
    except RayError as exc:
        cause = _cause(exc)
        if isinstance(cause, RerankError):
            raise cause from exc
        told = str(cause).strip().splitlines() or [""]
        raise JobError(
            f"a worker could not do its block ({type(cause).__name__}: {told[0][:500]}); what is done stays: start the job again."
        ) from exc


def _cause(exc: BaseException) -> BaseException:
    """Return the first error in a chain that is not Ray's own, else the last of the chain."""
    below = getattr(exc, "cause", None) or exc.__cause__
    return _cause(below) if isinstance(exc, RayError) and isinstance(below, BaseException) else exc
