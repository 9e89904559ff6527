"""A job's folder on any file system: small files written whole, listed, read and removed; nothing is renamed or appended to.

So it is as safe on an object store, where a rename is a copy, as on a disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem

from qwen_rerank.checks import shown_address
from qwen_rerank.errors import InvalidInputError, JobError

_CHECK = "sha256_of_this"
_NAMES_BEFORE_AT = ("abfs", "abfss", "hdfs")  # a container or a user stands there: a name, and no secret


def located(path: str | os.PathLike[str], filesystem: object = None) -> tuple[FileSystem, str]:
    """Return the file system of a path and the path on it.

    Args:
        path: A local path, or an address such as s3://bucket/folder that pyarrow or fsspec knows.
        filesystem: One of pyarrow's or fsspec's file systems, on which `path` is; None to tell by the path.

    Raises:
        InvalidInputError: If the address holds credentials, or nothing knows its kind.
    """
    text = os.fspath(path)
    if "://" in text:
        _check_address(text)
    if filesystem is not None:
        found = filesystem if isinstance(filesystem, FileSystem) else PyFileSystem(FSSpecHandler(filesystem))
        return found, text.rstrip("/")
    if "://" not in text:
        return LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        known, place = FileSystem.from_uri(text)
    except (ArrowException, ValueError, OSError):
        return _by_fsspec(text)
    return known, place.rstrip("/")


def _check_address(address: str) -> None:
    """Refuse what a job must not write down."""
    kind, _, rest = address.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if "?" in rest or (at and (":" in user or kind not in _NAMES_BEFORE_AT)):
        raise InvalidInputError(
            f"the address {shown_address(address)} holds credentials or a query ('?…'), which a job would write down; leave "
            "them to the environment, or give filesystem=."
        )


def _by_fsspec(address: str) -> tuple[FileSystem, str]:
    try:
        from fsspec.core import url_to_fs

        found, place = url_to_fs(address)
    except (ImportError, ValueError) as exc:
        raise InvalidInputError(
            f"nothing here knows the address {shown_address(address)} ({exc}); install what fsspec asks for, or give filesystem=."
        ) from exc
    return PyFileSystem(FSSpecHandler(found)), place.rstrip("/")


@dataclass(frozen=True)
class JobFolder:
    """The files of one job.

    Attributes:
        filesystem: Where they are.
        root: The folder, without a slash at its end.
    """

    filesystem: FileSystem
    root: str

    def write(self, name: str, data: bytes) -> None:
        """Write a file as a whole; durable on a local disk. What a killed process left half written counts for nothing."""
        path = self._path(name)
        try:
            if isinstance(self.filesystem, LocalFileSystem):
                _write_durably(Path(path), data)
                return
            self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
            with self.filesystem.open_output_stream(path) as file:
                file.write(data)
        except OSError as exc:
            raise JobError(f"{path} cannot be written ({exc}); name another output folder, or mend this one.") from exc

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or None where it is not there."""
        try:
            with self.filesystem.open_input_stream(self._path(name)) as file:
                content: bytes = file.read()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise JobError(f"{self._path(name)} cannot be read ({exc}); an output must be a folder.") from exc
        return content

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return name to bytes of every file below a folder."""
        selector = FileSelector(self._path(folder), allow_not_found=True, recursive=True)
        found = [info for info in self.filesystem.get_file_info(selector) if info.type == FileType.File]
        # Some file systems begin their paths with a slash that the folder was given without.
        start = len(self.root.strip("/")) + 1
        return {info.path.lstrip("/")[start:]: info.size for info in found}

    def delete(self, name: str) -> None:
        """Remove a file."""
        self.filesystem.delete_file(self._path(name))

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a JSON object with its own digest in it."""
        self.write(name, json.dumps({**record, _CHECK: _digest(record)}, ensure_ascii=False, indent=1).encode())

    def read_record(self, name: str) -> dict[str, Any] | None:
        """Return an object that `write_record` wrote; None where there is none, or a writer was killed over it."""
        try:
            record = json.loads(self.read(name) or b"null")
        except ValueError:
            return None
        if not isinstance(record, dict) or record.pop(_CHECK, None) != _digest(record):
            return None
        return record

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
