"""A process that converts files, so that one that hangs, crashes or eats memory costs itself alone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen_rerank.errors import InvalidInputError, MissingExtraError, RerankError
from qwen_rerank.folders.converters import KINDS
from qwen_rerank.folders.kinds import Converted, Kind
from qwen_rerank.folders.sections import Section

MEMORY_BYTES = 4 * 1024**3  # address space of the process; a file that needs more is refused


class ConversionFailedError(InvalidInputError):
    """A file was not converted this time: it took too long, or the process ended. Another time it may be."""


class Converter:
    """Converts files within their limits; those of kinds that are `outside` in a process that is started on first use.

    Args:
        text_column: Column of tables that is read; None for the usual names, else all columns.
        seconds: Replaces the time that each kind has.
    """

    def __init__(self, *, text_column: str | None = None, seconds: float | None = None) -> None:
        self.text_column = text_column
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def convert(self, path: Path, kind: Kind, data: bytes) -> Converted:
        """Return the sections of a file.

        Raises:
            InvalidInputError: If it cannot be read, or not within the limits of its kind; the message says why. A
                `ConversionFailedError` if it may go well another time.
            OSError: If no process can be started.
            MissingExtraError: If the package that reads its kind is not installed.
        """
        if len(data) > kind.limits.file_bytes:
            raise InvalidInputError(f"{len(data)} bytes; of this kind at most {kind.limits.file_bytes} are read.")
        if not kind.outside:
            return kind.convert(data, self.text_column, kind.limits)
        return self._outside(path, data, self._seconds or kind.limits.seconds or 60.0)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def _outside(self, path: Path, data: bytes, seconds: float) -> Converted:
        process = self._process = self._process or _start()
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        head = json.dumps({"suffix": path.suffix.lower(), "bytes": len(data), "text_column": self.text_column})
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(head.encode() + b"\n" + data)
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line.endswith(b"\n"):
            self.close()
            why = (
                f"not read within {seconds:g} seconds" if late else "the converter crashed on it, or ran out of memory"
            )
            raise ConversionFailedError(f"{why}; leave it out or repair it.")
        return _from_answer(json.loads(line))


def _start() -> subprocess.Popen[bytes]:
    # The child finds this package where the parent did, also in a checkout; `-m` would import the caller's `__main__` not at all.
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "qwen_rerank.folders.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def _from_answer(answer: dict[str, Any]) -> Converted:
    if missing := answer.get("missing"):
        raise MissingExtraError(missing["feature"], package=missing["package"], extra=missing["extra"])
    if reason := answer.get("failed"):
        raise ConversionFailedError(reason)
    if reason := answer.get("refused_file"):
        raise InvalidInputError(reason)
    found = [
        Section(one["text"], tuple(one["heading"]), one["line"], one["place"], one["alone"])
        for one in answer["sections"]
    ]
    return Converted(found, answer["notes"], [(n, why) for n, why in answer["refused"]], answer["n_refused"])


def _answer(request: dict[str, Any], data: bytes) -> dict[str, Any]:
    kind = KINDS[request["suffix"]]
    try:
        return asdict(kind.convert(data, request["text_column"], kind.limits))
    except MissingExtraError as exc:
        return {"missing": {"feature": exc.feature, "package": exc.package, "extra": exc.extra}}
    except RerankError as exc:
        return {"refused_file": str(exc)}
    except MemoryError:
        return {"failed": "it needs more memory than a file may, or than there is; leave it out."}
    except Exception as exc:  # the converters have no common base for their errors
        return {"refused_file": f"not readable ({type(exc).__name__}: {str(exc)[:200]})."}


def main() -> None:
    """Answer each request on stdin, a line of JSON and the file's bytes, with a line of JSON on stdout."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a converter prints is no answer
    while line := requests.readline():
        request = json.loads(line)
        text = json.dumps(_answer(request, requests.read(request["bytes"])), default=str)
        answers.write(text.encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
