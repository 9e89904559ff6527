"""Bytes → JSON object, strictly: UTF-8, finite numbers, no key twice, no lone surrogate, bounded depth and size."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from qwen_rerank.serve.errors import ApiError

MAX_DEPTH = 64
MAX_KEYS = 100_000
MAX_DIGITS = 400

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the body as a JSON object.

    Raises:
        ApiError: 400 where it is no strict JSON, 413 where it is too complex, 422 where it is no object or holds a text
            that UTF-8 cannot carry.
    """
    if not body.strip():
        raise ApiError(400, "empty_body", "the body is empty; send a JSON object.")
    value = _parse(_decode(body))
    if not isinstance(value, dict):
        raise ApiError(422, "invalid_request", f"the body must be a JSON object, not {_json_name(value)}.")
    _check_depth(value)
    if _SURROGATE_ESCAPE.search(body):
        _check_surrogates(value)
    return value


def _decode(body: bytes) -> str:
    if body.startswith(b"\xef\xbb\xbf"):
        raise ApiError(400, "invalid_encoding", "the body starts with a byte order mark; send plain UTF-8.")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ApiError(400, "invalid_encoding", f"the body is not UTF-8 (byte {exc.start}).") from exc


def _parse(text: str) -> Any:
    keys = 0

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal keys
        keys += len(items)
        if keys > MAX_KEYS:
            raise ApiError(413, "too_many_keys", f"the body holds more than {MAX_KEYS} keys.")
        found = dict(items)
        if len(found) != len(items):
            raise ApiError(400, "duplicate_key", "an object of the body has the same key twice.")
        return found

    try:
        return json.loads(
            text, object_pairs_hook=pairs, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite
        )
    except RecursionError as exc:
        raise ApiError(400, "too_deep", f"the body is nested deeper than {MAX_DEPTH} levels.") from exc
    except ValueError as exc:
        place = f" at character {exc.pos}" if isinstance(exc, json.JSONDecodeError) else ""
        raise ApiError(400, "invalid_json", f"the body is not valid JSON{place}.") from exc


def _no_constant(_: str) -> float:
    raise ApiError(400, "non_finite_number", "NaN and Infinity are no JSON numbers.")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ApiError(400, "number_too_long", f"a number of the body has more than {MAX_DIGITS} digits.")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ApiError(400, "non_finite_number", "a number of the body is too large.")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ApiError(400, "too_deep", f"the body is nested deeper than {MAX_DEPTH} levels.")


def _check_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            _check_encodable(node)
        elif isinstance(node, dict):
            waiting += [*node.keys(), *node.values()]
        elif isinstance(node, list):
            waiting += node


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        message = "a text of the body holds a lone surrogate, which UTF-8 cannot carry."
        raise ApiError(422, "invalid_unicode", message) from exc


def _json_name(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case _:
            return "an array"
