"""The input of a job cut into blocks: always the same ones of the same files, so that each can be done by anybody, once."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from qwen_rerank.bulk.job_folder import JobFolder, located
from qwen_rerank.documents.reader import MAX_LINE_BYTES, Row, line_row
from qwen_rerank.errors import FileError, InvalidInputError

_CHUNK_BYTES = 8 << 20
_NEWLINE = 10
_HIDDEN = re.compile(r"[/\\][._]")
_FORMATS: dict[str, Literal["parquet", "jsonl"]] = {".parquet": "parquet", ".jsonl": "jsonl"}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of input as it was when the job began.

    Attributes:
        path: On its file system.
        bytes: Its size.
        sha256: Of a JSONL file's content, or of what a Parquet file's end says of its content.
        rows: Lines of a JSONL file, blank ones included, or rows of a Parquet file.
    """

    path: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one file that are done together.

    Attributes:
        id: Names the block within its job.
        path: The file.
        start: 0-based row in the file.
        stop: Row behind the last.
        place: Byte at which the first line of a JSONL file begins; number of the row group of a Parquet file.
        extent: Bytes up to behind the last line; 0-based row within the row group.
    """

    id: str
    path: str
    start: int
    stop: int
    place: int
    extent: int

    @property
    def rows(self) -> int:
        """Rows from the first to the last."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class JobInput:
    """Everything that a job reads.

    Attributes:
        filesystem: Where the files are.
        given: Paths as they were given; empty where a file system was given with them.
        files: The files, in the order of their blocks.
        blocks: All rows, each in one block.
    """

    filesystem: FileSystem
    given: list[str]
    files: list[InputFile]
    blocks: list[Block]


def cut_input(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    block_rows: int,
    *,
    filesystem: object = None,
    output: JobFolder | None = None,
) -> JobInput:
    """Return the blocks of files and folders, each file once, at most `block_rows` rows a block.

    Folders are searched through; hidden entries and, on a local disk, links in them are left out.

    Raises:
        InvalidInputError: If nothing is there, a file is neither .parquet nor .jsonl, or `output` is in an input.
        FileError: If a file cannot be read, or a line is too long.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise InvalidInputError("inputs is empty; give a .parquet or .jsonl file or a folder of them.")
    places = [located(path, filesystem) for path in listed]
    system = places[0][0]
    if not all(other.equals(system) for other, _ in places):
        raise InvalidInputError("inputs are on several file systems; copy them to one, or run a job for each.")
    if output is not None and output.filesystem.equals(system):
        _check_apart(system, output.root, [place for _, place in places])
    files: list[InputFile] = []
    blocks: list[Block] = []
    found: dict[str, str] = {}
    for path in (file for _, place in places for file in _files(system, place)):
        found.setdefault(_real(system, path), path)
    for path in found.values():
        cut = _cut_parquet if _format(path) == "parquet" else _cut_lines
        try:
            file, pieces = cut(system, path, block_rows)
        except (OSError, pa.ArrowException) as exc:
            raise FileError(path, None, f"cannot be read ({exc}).") from exc
        blocks += [
            Block(f"{len(files):05d}-{start:012d}", path, start, stop, place, extent)
            for start, stop, place, extent in pieces
        ]
        files.append(file)
    given = [] if filesystem is not None else [_as_given(path) for path in listed]
    return JobInput(system, given, files, blocks)


def check_unchanged(given: JobInput) -> None:
    """Raise unless every file has the size that it was cut with.

    Raises:
        FileError: If one has grown, shrunk or gone: rows may be missing.
    """
    infos = given.filesystem.get_file_info([file.path for file in given.files])
    for file, info in zip(given.files, infos, strict=True):
        if info.size != file.bytes:
            raise changed(file.path)


def _as_given(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text if "://" in text else located(text)[1]


def _files(system: FileSystem, place: str) -> list[str]:
    [info] = system.get_file_info([place])
    if info.type == FileType.File:
        _format(place)
        return [place]
    if info.type == FileType.NotFound:
        raise InvalidInputError(f"{place!r} does not exist; give a .parquet or .jsonl file or a folder of them.")
    names = [name for name in sorted(_below(system, place)) if os.path.splitext(name)[1].lower() in _FORMATS]
    kept = [name for name in names if not _HIDDEN.search(name[len(place) :])]
    if not kept:
        raise InvalidInputError(
            f"{place!r} holds no .parquet or .jsonl file that is neither hidden nor a link; give another folder."
        )
    return kept


def _below(system: FileSystem, place: str) -> Iterator[str]:
    """Yield every file in a folder; on a local disk without links, behind which files may come a second time."""
    if not isinstance(system, LocalFileSystem):
        found = system.get_file_info(FileSelector(place, recursive=True))
        yield from (one.path for one in found if one.type == FileType.File)
        return
    folders = [place]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        yield entry.path
        except OSError as exc:
            raise FileError(exc.filename or place, None, f"cannot be read ({exc.strerror}).") from exc


def _real(system: FileSystem, place: str) -> str:
    return os.path.realpath(place) if isinstance(system, LocalFileSystem) else place.strip("/")


def _check_apart(system: FileSystem, output: str, places: Sequence[str]) -> None:
    for place in places:
        outer, inner = (PurePath(_real(system, one)) for one in (place, output))
        if inner.is_relative_to(outer):
            raise InvalidInputError(
                f"the output folder {output!r} is in the input {place!r}, and its parts would be read as input; give a folder "
                "beside it."
            )


def _format(path: str) -> Literal["parquet", "jsonl"]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FORMATS:
        raise InvalidInputError(
            f"{path!r} is neither a .parquet nor a .jsonl file; convert it (a packed file cannot be cut: unpack it)."
        )
    return _FORMATS[suffix]


_Piece = tuple[int, int, int, int]


def _cut_lines(system: FileSystem, path: str, block_rows: int) -> tuple[InputFile, list[_Piece]]:
    """Cut a JSONL file in one pass over its bytes."""
    digest, size, lines = hashlib.sha256(), 0, 0
    last_end = 0  # of the last line that is complete
    starts = [0]  # byte at which each block begins
    with system.open_input_stream(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE) + size + 1
            size += len(chunk)
            longest = int(np.diff(ends, prepend=last_end, append=size).max(initial=0))
            if longest > MAX_LINE_BYTES:
                raise FileError(path, None, f"has a line of more than {MAX_LINE_BYTES} bytes; cut it.")
            first = block_rows - lines % block_rows - 1  # the line of this chunk that ends a block
            starts += ends[first::block_rows].tolist()
            lines += len(ends)
            last_end = int(ends[-1]) if len(ends) else last_end
    if last_end < size:
        lines += 1  # a last line without its end
    if starts[-1] == size:
        starts.pop()
    pieces = []
    for number, start in enumerate(starts):
        begun = number * block_rows
        end = starts[number + 1] if number + 1 < len(starts) else size
        pieces.append((begun, min(begun + block_rows, lines), start, end - start))
    return InputFile(path, size, digest.hexdigest(), lines), pieces


def _cut_parquet(system: FileSystem, path: str, block_rows: int) -> tuple[InputFile, list[_Piece]]:
    """Cut a Parquet file within its row groups; its end tells each column's place, size and least and greatest value."""
    [info] = system.get_file_info([path])
    with system.open_input_file(path) as opened:
        metadata = pq.ParquetFile(opened).metadata
        opened.seek(max(0, info.size - 8))
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, info.size - 8 - length))
        digest = hashlib.sha256(opened.read(length)).hexdigest()
    pieces, first = [], 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        for within in range(0, count, block_rows):
            stop = min(within + block_rows, count)
            pieces.append((first + within, first + stop, group, within))
        first += count
    return InputFile(path, info.size, digest, metadata.num_rows), pieces


class BlockReader:
    """Reads blocks; of a Parquet file the last row group stays in memory, because the next block is likely of it.

    Args:
        filesystem: Where the files are.
    """

    def __init__(self, filesystem: FileSystem) -> None:
        self._filesystem = filesystem
        self._group: tuple[str, int, pa.Table] | None = None

    def rows(self, block: Block) -> Iterator[tuple[int, Row | InvalidInputError]]:
        """Yield (1-based row or line, its values, or why it has none) of a block; blank lines are no rows."""
        if _format(block.path) == "parquet":
            yield from self._parquet_rows(block)
            return
        with self._filesystem.open_input_file(block.path) as file:
            file.seek(block.place)
            data = file.read(block.extent)
        if len(data) != block.extent:
            raise changed(block.path)
        for number, line in enumerate(data.split(b"\n")[: block.rows], start=block.start + 1):
            if line.strip():
                try:
                    yield number, line_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                except InvalidInputError as exc:
                    yield number, exc

    def _parquet_rows(self, block: Block) -> Iterator[tuple[int, Row | InvalidInputError]]:
        if self._group is None or self._group[:2] != (block.path, block.place):
            try:
                with self._filesystem.open_input_file(block.path) as file:
                    self._group = (block.path, block.place, pq.ParquetFile(file).read_row_group(block.place))
            except (OSError, pa.ArrowException) as exc:
                raise FileError(block.path, None, f"row group {block.place} cannot be read ({exc}).") from exc
        table = self._group[2].slice(block.extent, block.rows)
        if len(table) != block.rows:
            raise changed(block.path)
        for number, row in enumerate(_python_rows(table), block.start + 1):
            yield number, row if isinstance(row, InvalidInputError) else _without_nulls(row)


def changed(path: str) -> FileError:
    """Return the error for a file that is no longer what was cut into blocks."""
    return FileError(path, None, "has changed since the job began; start a job with another output folder.")


def _without_nulls(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


def _python_rows(table: pa.Table) -> list[Row | InvalidInputError]:
    """Return the rows; one whose bytes are no UTF-8, or whose date Python does not know, is an error and touches no other."""
    try:
        found: list[Row | InvalidInputError] = table.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as exc:
        if len(table) == 1:
            return [InvalidInputError(f"a value cannot be read ({exc}).")]
        return [row for place in range(len(table)) for row in _python_rows(table.slice(place, 1))]
    return found
