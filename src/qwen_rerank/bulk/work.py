"""The work on one block: its rows are read, a model makes others of them, and a part file and the refused rows are written.

Whoever does a block, a worker on a cluster or the one process, does it here.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from qwen_rerank.bulk.blocks import Block, BlockReader
from qwen_rerank.bulk.job_folder import JobFolder
from qwen_rerank.documents.reader import Row
from qwen_rerank.errors import InvalidInputError

Format = Literal["parquet", "jsonl"]
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Reject:
    """A row, or a candidate of a row, that gave nothing.

    Attributes:
        row: 1-based row, or line of a JSONL file.
        query_id: Of the query, where the row has one.
        doc_id: Of the document, where the row has one.
        error: Class of the error.
        reason: Its message.
    """

    row: int
    query_id: str | None
    doc_id: str | None
    error: str
    reason: str

    @classmethod
    def because(cls, error: Exception, row: int, query_id: object = None, doc_id: object = None) -> Reject:
        """Return the reject of an error."""
        query_id, doc_id = (None if one is None else str(one) for one in (query_id, doc_id))
        return cls(row, query_id, doc_id, type(error).__name__, str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartEntry:
    """One entry of the manifest: a block that is done.

    Attributes:
        block: Its id.
        rows_in: Rows that were read.
        rows: Rows that were made.
        rejects: Rows and candidates that gave nothing.
        part: File of the rows, or "" where there are none.
        part_bytes: Its size.
        part_sha256: Its digest.
        rejects_part: File of the rejects, or "".
        rejects_bytes: Its size.
        fingerprint: Of the model that did it.
    """

    block: str
    rows_in: int
    rows: int
    rejects: int
    part: str
    part_bytes: int
    part_sha256: str
    rejects_part: str
    rejects_bytes: int
    fingerprint: str

    @property
    def files(self) -> dict[str, int]:
        """The files that it names, with their sizes."""
        named = {self.part: self.part_bytes, self.rejects_part: self.rejects_bytes}
        return {name: size for name, size in named.items() if name}


@dataclass(frozen=True, kw_only=True)
class BulkTask(ABC, Generic[E]):
    """A kind of work with its settings; it travels to the workers, so it holds no model.

    Attributes:
        model: Name of the model, or a function that loads it; called once in each worker.
        folder: Where parts go.
        source: Where the input is.
        format: Of the parts.
    """

    model: Callable[[], object] | str
    folder: JobFolder
    source: FileSystem
    format: Format

    kind: ClassVar[str] = ""
    columns: ClassVar[tuple[tuple[str, pa.DataType], ...]] = ()

    @abstractmethod
    def open(self) -> E:
        """Return the model, loaded, after it has shown that it works: a broken one must not refuse every row."""

    @abstractmethod
    def fingerprint(self, engine: E) -> str:
        """Return what changes with anything that changes a row."""

    @abstractmethod
    def make(self, engine: E, path: str, rows: Sequence[tuple[int, Row]], rejects: list[Reject]) -> pa.Table:
        """Return what becomes of rows of a file; those that give nothing are added to `rejects`."""

    def settings(self) -> dict[str, Any]:
        """Return what a job that goes on must have in common with the one that began, besides model and input."""
        return {"kind": self.kind, "output_format": self.format, "columns": [name for name, _ in self.columns]}

    def table(self, columns: dict[str, Any], **types: pa.DataType) -> pa.Table:
        """Return columns as a table of this kind's schema; `types` are those that only the model knows."""
        fields = [pa.field(name, types.get(name, kind)) for name, kind in self.columns]
        arrays = [columns[one.name] if one.name in types else pa.array(columns[one.name], one.type) for one in fields]
        return pa.table(arrays, schema=pa.schema(fields, metadata={"qwen_rerank": f"{self.kind}/1"}))


class BlockWorker:
    """Does blocks with one model.

    Args:
        task: The work.
    """

    def __init__(self, task: BulkTask[Any]) -> None:
        self._task = task
        self._engine = task.open()
        self._reader = BlockReader(task.source)
        self.fingerprint: str = task.fingerprint(self._engine)

    def do(self, block: Block) -> PartEntry:
        """Return the entry of a block whose part and rejects are written; until the entry is, they do not count."""
        rows: list[tuple[int, Row]] = []
        rejects: list[Reject] = []
        for number, row in self._reader.rows(block):
            if isinstance(row, InvalidInputError):
                rejects.append(Reject.because(row, number))
            else:
                rows.append((number, row))
        rows_in = len(rows) + len(rejects)
        made = self._task.make(self._engine, block.path, rows, rejects)
        data = encoded(made, self._task.format) if made.num_rows else b""
        told = [{"file": block.path, **asdict(one)} for one in sorted(rejects, key=lambda reject: reject.row)]
        # ASCII: a refused row may hold what no encoding can carry.
        lines = "".join(json.dumps(one) + "\n" for one in told).encode("ascii")
        # A name of its own for each attempt: another worker, thought dead, may be writing the same block.
        name = f"{block.id}-{uuid.uuid4().hex[:12]}"
        return PartEntry(
            block=block.id,
            rows_in=rows_in,
            rows=made.num_rows,
            rejects=len(rejects),
            part=self._write(f"parts/{name}.{self._task.format}", data),
            part_bytes=len(data),
            part_sha256=hashlib.sha256(data).hexdigest(),
            rejects_part=self._write(f"rejects/{name}.jsonl", lines),
            rejects_bytes=len(lines),
            fingerprint=self.fingerprint,
        )

    def _write(self, name: str, data: bytes) -> str:
        """Write a file unless it would be empty, and return its name, or ""."""
        if data:
            self._task.folder.write(name, data)
        return name if data else ""


def encoded(table: pa.Table, format: Format) -> bytes:
    """Return a table as the content of a file."""
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()).encode()
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decoded(data: bytes, format: Format, schema: pa.Schema | None = None) -> pa.Table:
    """Return the table of a file's content; of JSONL with the types of `schema`."""
    if format == "jsonl":
        return pa.Table.from_pylist([json.loads(line) for line in data.splitlines()], schema=schema)
    return pq.read_table(io.BytesIO(data))
