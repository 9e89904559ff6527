"""The driver of a job: it has blocks done and writes each into the manifest; a job that was killed goes on where it was.

A job's folder holds `job.json` (settings and input), `owner.json` (the run that may write), `parts/`, `rejects/`, and in
`manifest/` an entry for each block that is done, which names its part with rows, size and digest. A part without an entry
does not exist. A later run takes a job over; an earlier one that still lives notices before its next entry, and stops.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import pyarrow as pa
from tqdm import tqdm

from qwen_rerank.bulk.blocks import Block, JobInput, check_unchanged
from qwen_rerank.bulk.job_folder import JobFolder, located
from qwen_rerank.bulk.tasks import SCHEMAS
from qwen_rerank.bulk.work import BlockWorker, BulkTask, PartEntry, decoded
from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError, JobError

log = logging.getLogger(__name__)

FORMAT = 1
_JOB, _OWNER, _MANIFEST = "job.json", "owner.json", "manifest"
_FOLDERS = (f"{_MANIFEST}/", "parts/", "rejects/")
_READERS = 16  # entries that are read at a time: on an object store each takes a round trip
_ROUNDS = 3  # of doing again what is missing at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Workers on Ray, each with a model of its own.

    Attributes:
        count: How many.
        cpus: Cores of each; a model on a CPU uses no more threads.
        gpus: GPUs of each; 0.5 puts two workers on one.
        retries: How often a block is done again whose worker died, before the job stops.
        address: Of the Ray cluster; None for the one that the environment names, else a local one for this job.
    """

    count: int = 1
    cpus: float = 1
    gpus: float = 0
    retries: int = 3
    address: str | None = None

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_count("retries", self.retries, minimum=0)
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10_000:
                raise InvalidInputError(f"{name} must be a number of at least 0, not {value!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """The state of a job: blocks and rows that are done.

    Attributes:
        kind: "embed", "pairs" or "runs".
        output: The job's folder.
        blocks: Blocks of the input.
        blocks_done: Those with an entry in the manifest.
        rows_in: Rows that were read in them.
        rows: Rows that were made.
        rejects: Rows and candidates that gave nothing; the files in `rejects/` say why.
        orphans: Files of attempts that do not count.
    """

    kind: str
    output: str
    blocks: int
    blocks_done: int
    rows_in: int
    rows: int
    rejects: int
    orphans: int

    @property
    def complete(self) -> bool:
        """Whether every block is done."""
        return self.blocks_done == self.blocks


class Executor(Protocol):
    """Does blocks, in this process or elsewhere."""

    fingerprint: str

    def map(self, blocks: Sequence[Block]) -> Iterator[PartEntry]:
        """Yield the entry of each block, as they are done."""
        ...


class _InProcess:
    """Does one block after the other, here."""

    def __init__(self, task: BulkTask[Any]) -> None:
        self._worker = BlockWorker(task)
        self.fingerprint = self._worker.fingerprint

    def map(self, blocks: Sequence[Block]) -> Iterator[PartEntry]:
        return map(self._worker.do, blocks)


def run_job(
    task: BulkTask[Any],
    given: JobInput,
    *,
    block_rows: int,
    model: dict[str, Any] | None,
    workers: Workers | int | None,
) -> JobStatus:
    """Do every block that is not done yet, and return how the job stands.

    Args:
        task: The work on a block.
        given: The input.
        block_rows: Rows of a block.
        model: Name and options of the model, for a run that knows no more than the folder; None where it has none.
        workers: On Ray; None or 0 for this process.

    Raises:
        InvalidInputError: If the folder holds something else, or a job with other settings.
        JobError: If another run took over, or a worker cannot do its block.
    """
    settings = {
        **task.settings(),
        "format": FORMAT,
        "block_rows": block_rows,
        "inputs": [asdict(file) for file in given.files],
    }
    before = _matching(task.folder, settings)
    with _executor(task, workers) as executor:
        if before is None:
            also = {
                "fingerprint": executor.fingerprint,
                "blocks": len(given.blocks),
                "model": model,
                "given": given.given,
            }
            task.folder.write_record(_JOB, {**settings, **also})
        elif before["fingerprint"] != executor.fingerprint:
            raise _unlike(task.folder, "model", before["fingerprint"], executor.fingerprint)
        return _JobRun(task, given, executor).finish()


def _executor(task: BulkTask[Any], workers: Workers | int | None) -> AbstractContextManager[Executor]:
    if not workers:
        return nullcontext(_InProcess(task))
    from qwen_rerank.bulk.on_ray import ray_executor

    return ray_executor(task, workers if isinstance(workers, Workers) else Workers(count=workers))


def _matching(folder: JobFolder, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the job that the folder holds, or None where it can begin; refuse another job and anything else."""
    found = folder.read_record(_JOB)
    if found is None:
        names = folder.sizes()
        foreign = [name for name in names if name not in (_JOB, _OWNER) and not name.startswith(_FOLDERS)]
        if foreign:
            raise InvalidInputError(f"{folder.root!r} holds other files ({foreign[0]}); give an empty folder.")
        if any(name.startswith(_FOLDERS) for name in names):
            raise JobError(f"{folder.root!r} holds parts and no readable job.json; give an empty folder.")
        return None
    for name, value in settings.items():
        if found.get(name) != value:
            raise _unlike(folder, name, found.get(name), value)
    return found


def _unlike(folder: JobFolder, name: str, old: object, new: object) -> InvalidInputError:
    if name == "inputs":
        return InvalidInputError(
            f"{folder.root!r} holds a job over other input, or its files have changed; give another output folder."
        )
    return InvalidInputError(
        f"{folder.root!r} holds a job with {name} {old!r}, and now it is {new!r}; give another output folder, or what the "
        "job began with."
    )


class _JobRun:
    """One run of a job: from taking it over to its end."""

    def __init__(self, task: BulkTask[Any], given: JobInput, executor: Executor) -> None:
        self._task = task
        self._folder = task.folder
        self._input = given
        self._blocks = {block.id: block for block in given.blocks}
        self._executor = executor
        self._owner = uuid.uuid4().hex
        self._folder.write_record(_OWNER, {"run": self._owner})

    def finish(self) -> JobStatus:
        """Do what is not done, and remove what does not count."""
        for _ in range(_ROUNDS):
            entries = read_entries(self._folder)
            left = [block for block in self._blocks.values() if block.id not in entries]
            if not left:
                check_unchanged(self._input)
                self._clean(entries)
                return _status(self._folder, self._task.kind, len(self._blocks), entries)
            self._do(left)
        raise JobError(
            f"parts vanish from {self._folder.root!r} while the job writes them; does another run write there?"
        )

    def _do(self, blocks: Sequence[Block]) -> None:
        total = sum(block.rows for block in blocks)
        with tqdm(total=total, desc=self._task.kind, unit="row", disable=None) as bar:
            for entry in self._executor.map(blocks):
                if entry.fingerprint != self._executor.fingerprint:
                    raise JobError(
                        f"a worker has another model ({entry.fingerprint}); install the same on all machines."
                    )
                if not self._owns():
                    for name in entry.files:
                        with suppress(OSError):  # the other run may have removed it
                            self._folder.delete(name)
                    raise self._taken_over()
                self._folder.write_record(f"{_MANIFEST}/{entry.block}.json", asdict(entry))
                bar.update(self._blocks[entry.block].rows)

    def _owns(self) -> bool:
        return self._folder.read_record(_OWNER) == {"run": self._owner}

    def _taken_over(self) -> JobError:
        return JobError(f"another run took over the job in {self._folder.root!r}; this one stops.")

    def _clean(self, entries: dict[str, PartEntry]) -> None:
        for name in _orphans(self._folder.sizes(), entries.values()):
            if not self._owns():
                raise self._taken_over()
            self._folder.delete(name)


def read_entries(folder: JobFolder) -> dict[str, PartEntry]:
    """Return by block the entries whose files are there in full."""
    sizes = folder.sizes()
    names = sorted(name for name in sizes if name.startswith(f"{_MANIFEST}/"))
    with ThreadPoolExecutor(_READERS) as pool:
        records = [record for record in pool.map(folder.read_record, names) if record is not None]
    entries = [PartEntry(**record) for record in records]
    whole = {}
    for entry in entries:
        if all(sizes.get(name) == size for name, size in entry.files.items()):
            whole[entry.block] = entry
        else:
            log.warning("block %s lacks a file or a part of it; it is done again", entry.block)
    return whole


def _orphans(sizes: Iterable[str], entries: Iterable[PartEntry]) -> list[str]:
    named = {name for entry in entries for name in entry.files}
    return [name for name in sizes if name.startswith(("parts/", "rejects/")) and name not in named]


def _status(folder: JobFolder, kind: str, blocks: int, entries: dict[str, PartEntry]) -> JobStatus:
    return JobStatus(
        kind=kind,
        output=folder.root,
        blocks=blocks,
        blocks_done=len(entries),
        rows_in=sum(entry.rows_in for entry in entries.values()),
        rows=sum(entry.rows for entry in entries.values()),
        rejects=sum(entry.rejects for entry in entries.values()),
        orphans=len(_orphans(folder.sizes(), entries.values())),
    )


def open_job(output: str, filesystem: object = None) -> tuple[JobFolder, dict[str, Any]]:
    """Return a job's folder and what its `job.json` says.

    Raises:
        InvalidInputError: If there is no job.
        JobError: If it was written by a later version.
    """
    folder = JobFolder(*located(output, filesystem))
    job = folder.read_record(_JOB)
    if job is None:
        raise InvalidInputError(f"{folder.root!r} holds no job; give the output folder of one.")
    if job["format"] != FORMAT:
        raise JobError(f"{folder.root!r} is a job of format {job['format']}, and this version reads {FORMAT}; upgrade.")
    return folder, job


def job_status(output: str, *, filesystem: object = None) -> JobStatus:
    """Return how far a job is, from its manifest; the job may be running.

    Args:
        output: The job's folder.
        filesystem: As in `embed_corpus`.

    Raises:
        InvalidInputError: If there is no job.
    """
    folder, job = open_job(output, filesystem)
    return _status(folder, job["kind"], job["blocks"], read_entries(folder))


def read_rows(output: str, *, filesystem: object = None) -> Iterator[pa.Table]:
    """Yield the rows of a job, a table a block in input order, each compared with its digest.

    Args:
        output: The job's folder.
        filesystem: As in `embed_corpus`.

    Raises:
        InvalidInputError: If there is no job, or it is not complete.
        JobError: If a part is damaged.
    """
    folder, job = open_job(output, filesystem)
    entries = read_entries(folder)
    if len(entries) != job["blocks"]:
        raise InvalidInputError(
            f"{len(entries)} of {job['blocks']} blocks are done in {folder.root!r}; let the job go on to its end first."
        )
    for block in sorted(entries, key=lambda id: tuple(map(int, id.split("-")))):
        if entry := entries[block].part:
            data = folder.read(entry) or b""
            if hashlib.sha256(data).hexdigest() != entries[block].part_sha256:
                raise JobError(f"{folder.root}/{entry} is not what was written; remove it, and let the job go on.")
            yield decoded(data, job["output_format"], SCHEMAS[job["kind"]])
