"""Sections to passages: pieces of a bounded number of tokens that end where a paragraph or a sentence does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.sections import Section
from qwen_rerank.models.folder import read_tokenizer
from qwen_rerank.models.names import find_model
from qwen_rerank.passages import CLAUSE_END, SENTENCE_END

_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")
_BACKOFF = 2 / 3  # a passage gives up at most a third of its length to end with a paragraph or a sentence
_PIECE_CHARS = 50_000  # tokenized at a time


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a file.

    Attributes:
        section: The part that it is of; its `text` is the passage's own, its `line` where that begins.
        last_line: Line where the text ends; None where the file has no lines.
    """

    section: Section
    last_line: int | None


@dataclass(frozen=True, slots=True)
class CutSettings:
    """Settings of the cutting.

    Attributes:
        tokens: Longest passage, in tokens of the tokenizer that ships with this package.
        overlap: Tokens that a passage repeats of the one before, at most half of it.
    """

    tokens: int = 300
    overlap: int = 30

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens, minimum=16)
        check_count("overlap", self.overlap, minimum=0)
        if self.overlap * 2 > self.tokens:
            raise InvalidInputError(f"overlap ({self.overlap}) must be at most half of tokens ({self.tokens}).")


def cut(sections: Sequence[Section], settings: CutSettings) -> list[Passage]:
    """Return the passages of a file in reading order; short sections that follow each other are joined."""
    return [
        passage
        for section, starts in _joined([(one, _starts(one.text)) for one in sections], settings)
        for passage in _pieces(section, starts, settings)
    ]


def _joined(measured: list[tuple[Section, np.ndarray]], settings: CutSettings) -> Iterator[tuple[Section, np.ndarray]]:
    """Yield the sections, those that are much shorter than a passage joined with what follows in the same place."""
    held: tuple[Section, np.ndarray] | None = None
    for section, starts in measured:
        if held is not None and _join(held, (section, starts), settings):
            first, before = held
            gap = "\n\n" if first.line is None else ""
            text = first.text + gap + section.text
            heading = (
                first.heading if first.heading == section.heading[: len(first.heading)] else _common(first, section)
            )
            held = (
                replace(first, text=text, heading=heading),
                np.concatenate([before, starts + len(first.text) + len(gap)]),
            )
            continue
        if held is not None:
            yield held
        held = section, starts
    if held is not None:
        yield held


def _join(first: tuple[Section, np.ndarray], second: tuple[Section, np.ndarray], settings: CutSettings) -> bool:
    (one, a), (other, b) = first, second
    near = one.place == other.place and not one.alone and not other.alone
    # A section under another first heading begins something new; below it a short one says too little alone.
    related = one.heading[:1] == other.heading[:1]
    return near and related and len(a) * 4 < settings.tokens and len(a) + len(b) <= settings.tokens


def _common(one: Section, other: Section) -> tuple[str, ...]:
    shared = [a for a, b in zip(one.heading, other.heading, strict=False) if a == b]
    return tuple(shared) or one.heading


def _pieces(section: Section, starts: np.ndarray, settings: CutSettings) -> Iterator[Passage]:
    text, begin = section.text, 0
    while True:
        # The token that holds `begin`: a word's token starts with the space before it, a sentence after that space.
        first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
        last = first + settings.tokens >= len(starts)
        end = len(text) if last else _end(text, starts, first, settings.tokens)
        yield from _passage(section, begin, end)
        if last:
            return
        begin = max(begin + 1, _next_start(text, starts, begin, end, settings.overlap))


def _passage(section: Section, begin: int, end: int) -> Iterator[Passage]:
    piece = section.text[begin:end]
    stripped = piece.strip()
    if not stripped:
        return
    begin += len(piece) - len(piece.lstrip())
    line = None if section.line is None else section.line + section.text.count("\n", 0, begin)
    last = None if line is None else line + stripped.count("\n")
    yield Passage(replace(section, text=stripped, line=line), last)


def _end(text: str, starts: np.ndarray, first: int, tokens: int) -> int:
    """Return the best place to end a passage: a paragraph's end, else a sentence's, a clause's, or its last token's."""
    low, high = int(starts[first + int(tokens * _BACKOFF)]), int(starts[first + tokens])
    for pattern in (_PARAGRAPH_END, SENTENCE_END, CLAUSE_END):
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        if ends:
            return ends[-1]
    return high


def _next_start(text: str, starts: np.ndarray, begin: int, end: int, overlap: int) -> int:
    """Return where the next passage begins: with the first sentence of the last `overlap` tokens, or at `end`."""
    at = int(np.searchsorted(starts, end))
    low = max(begin + 1, int(starts[max(0, at - overlap)])) if overlap else end
    sentences = (match.end() for match in SENTENCE_END.finditer(text, low, end))
    return next((start for start in sentences if start < end), end)


def _starts(text: str) -> np.ndarray:
    """Return where each token of a text begins, int64 `(n_tokens,)` characters."""
    found = []
    for begin in range(0, len(text), _PIECE_CHARS):
        piece = text[begin : begin + _PIECE_CHARS]
        offsets = _tokenizer().encode(piece, add_special_tokens=False).offsets
        found.append(np.unique(np.array([start for start, _ in offsets], dtype=np.int64)) + begin)
    return np.concatenate(found) if found else np.empty(0, np.int64)


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    # Not the scorer's own: the same file must give the same passages whatever model reads them.
    tokenizer = Tokenizer.from_str(read_tokenizer(Path(find_model("pocket").path) / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer
