"""JSON from elsewhere, in bounded time and memory: depth, values and digits are counted before one of them is built."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

MAX_DEPTH = 64
MAX_VALUES = 100_000  # and as many strings, keys, commas and colons
MAX_DIGITS = 400
_SMALL_BYTES = 1 << 16  # as little costs little, whatever is in it

_BETWEEN_VALUES = bytes.maketrans(b"[]{}:", b",,,,,")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class JsonLimitError(ValueError):
    """JSON that would take too much to read.

    Args:
        code: Which limit it is beyond, for programs.
        message: What it does, without anything of it: "is nested deeper than 64 levels".
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_json(data: bytes, *, max_values: int = MAX_VALUES) -> int:
    """Return how many keys there are in JSON, by passes over its bytes that build nothing of it.

    What is no JSON passes, too, unless its brackets, commas or digits are too many.

    Raises:
        JsonLimitError: If it is too deep, or has too many values or digits.
    """
    if data.count(b'"') - data.count(b'\\"') > 2 * max_values:  # at least half of the quotes that are not escaped
        raise _too_many(max_values)
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    if plain.count(b'"') > 2 * max_values:
        raise _too_many(max_values)
    structure = b'"'.join(plain.split(b'"')[::2]).translate(None, b' \t\r\n"')
    counts = {mark: structure.count(mark) for mark in (b"[", b"{", b",", b":", b"]", b"}")}
    if counts[b"["] + counts[b"{"] + counts[b","] > max_values or counts[b":"] > max_values:
        raise _too_many(max_values)
    if counts[b"]"] + counts[b"}"] > max_values:
        raise JsonLimitError("invalid_json", "closes more than it opens")
    if max(map(len, structure.translate(_BETWEEN_VALUES).split(b","))) > MAX_DIGITS:
        raise JsonLimitError("number_too_long", f"has a number of more than {MAX_DIGITS} digits")
    brackets = np.frombuffer(structure.translate(None, _NO_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    if steps.cumsum().max(initial=0) > MAX_DEPTH:
        raise JsonLimitError("too_deep", f"is nested deeper than {MAX_DEPTH} levels")
    return counts[b":"]


def _too_many(max_values: int) -> JsonLimitError:
    return JsonLimitError("too_many_values", f"holds more than {max_values} values or keys")


def loads(data: bytes, *, max_values: int = MAX_VALUES) -> Any:
    """Return the value of the JSON in a file or a row of a database.

    Raises:
        JsonLimitError: If it would take too much to read.
        ValueError: If it is no JSON.
    """
    if len(data) > _SMALL_BYTES:
        check_json(data, max_values=max_values)
    try:
        return json.loads(data)
    except RecursionError:
        raise JsonLimitError("too_deep", "is nested too deeply") from None
