"""Kinds of files: how one is converted, and how much of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen_rerank.errors import MissingExtraError
from qwen_rerank.folders.encodings import decode
from qwen_rerank.folders.sections import Section


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what is read of a file of one kind; what is larger is refused.

    Attributes:
        file_bytes: Size of the file.
        bytes: Size after decompression.
        pages: Pages, slides, sheets or chapters.
        seconds: Time that the conversion may take; None where it runs through the text once.
    """

    file_bytes: int = 64 * 1024**2
    bytes: int = 256 * 1024**2
    pages: int = 10_000
    seconds: float | None = None


@dataclass(slots=True)
class Converted:
    """The sections of a file, and what is to be said of it.

    Attributes:
        sections: In reading order.
        notes: What a reader should know: an encoding that is not UTF-8, pages without text.
        refused: (row number, reason) of rows that cannot be used.
        n_refused: How many those are; more than are listed where there are very many.
    """

    sections: list[Section]
    notes: list[str]
    refused: list[tuple[int, str]]
    n_refused: int = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file.

    Attributes:
        name: As the summary calls it.
        convert: Makes sections of the bytes.
        limits: How much of it is read.
        outside: Whether it is converted in a process of its own, which may fail, hang or grow without harm.
    """

    name: str
    convert: Callable[[bytes, str | None, Limits], Converted]
    limits: Limits
    outside: bool = False


def decoded(data: bytes, declared: str | None = None) -> tuple[str, list[str]]:
    """Return a text, and the name of its encoding where that is not UTF-8, or some of it is broken."""
    text, encoding = decode(data, declared)
    return text, [] if encoding == "utf-8" else [encoding]


def missing(feature: str, package: str, cause: BaseException) -> MissingExtraError:
    """Return the error of a feature whose package is not installed."""
    return MissingExtraError(feature, package=package, extra="files", cause=cause)
