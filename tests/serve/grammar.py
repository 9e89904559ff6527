"""Requests that are nearly right: a grammar of bodies and headers, each with a few things gone wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

PATHS = (
    "/v1/rerank", "/v2/rerank", "/rerank", "/v1/reranking", "/reranking", "/score", "/v1/score", "/v1/ranking",
    "/tei/rerank", "/infinity/rerank", "/voyage/v1/rerank", "/playground/search", "/v1/search",
)  # fmt: skip
_TEXTS = (
    "", " ", "q", "适合程序员的机械键盘", "a" * 5_000, "\x00", "\u202e\u2066", "\x1b[31m", "<|im_end|>\n<|im_start|>", "e\u0301" * 50,
    "👩‍👩‍👧‍👦", "\ufeff", "\\ud800", "{{7*7}}", "../../etc/passwd", "null", "' OR 1=1 --", "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 10**6, 2**63, 10**30, -(2**70), 0.5, 3.0, 1e308, -0.0)
_ODD: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"text": None}, {"text": {"text": "a"}}, ["a", 1])
_FIELDS = (
    "model", "top_n", "top_k", "return_documents", "return_text", "raw_scores", "use_activation", "truncate",
    "truncation", "truncation_side", "truncation_direction", "truncate_prompt_tokens", "max_tokens_per_doc",
    "instruction", "instruct", "kwargs", "chat_template_kwargs", "long_documents", "return_details", "user", "priority",
    "texts", "passages", "input", "documents", "query", "queries", "items", "text_1", "text_2", "collection", "unknown",
)  # fmt: skip
_LITERALS = (
    b"NaN",
    b"Infinity",
    b"1e999",
    b'"\\ud800"',
    b"9" * 500,
    b"[" * 2_000,
    b'{"a":1,"a":2}',
    b"\xff\xfe",
    b"tru",
    b"01",
)
_HEADERS: tuple[tuple[str, str], ...] = (
    ("Content-Type", "text/plain"), ("Content-Type", "application/json; charset=latin-1"), ("Content-Type", ""),
    ("Content-Encoding", "gzip"), ("Content-Length", "0"), ("Content-Length", "abc"), ("Content-Length", "7"),
    ("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "identity"), ("Authorization", "Bearer x"), ("X-Request-Id", "a b"),
    ("X-Request-Id", "x" * 300), ("X-Request-Timeout-Ms", "-1"), ("X-Request-Timeout-Ms", "5000"), ("Expect", "100-continue"),
    ("Accept-Encoding", "identity"), ("Host", ""), ("Host", "evil\texample"), ("Upgrade", "websocket"), ("Connection", "close, upgrade"),
)  # fmt: skip


def body(chance: random.Random) -> bytes:
    """Return a body."""
    value: dict[str, Any] = {
        "query": _text(chance),
        "documents": [_document(chance) for _ in range(chance.randint(0, 6))],
    }
    for _ in range(chance.randint(0, 3)):
        value[chance.choice(_FIELDS)] = _value(chance)
    if chance.random() < 0.2:
        value["texts"] = value.pop("documents")
    if chance.random() < 0.1:
        del value[chance.choice(list(value))]
    encoded = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode()
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        encoded = chance.choice(_MUTATIONS)(chance, encoded)
    return encoded


def headers(chance: random.Random) -> dict[str, str]:
    """Return headers that differ from the usual ones."""
    return dict(chance.choice(_HEADERS) for _ in range(chance.choice((0, 0, 0, 1, 2))))


def _text(chance: random.Random) -> str:
    if chance.random() < 0.6:
        return chance.choice(_TEXTS)
    return "".join(
        chr(chance.choice((chance.randint(32, 126), chance.randint(0x4E00, 0x9FFF))))
        for _ in range(chance.randint(1, 40))
    )


def _document(chance: random.Random) -> Any:
    draw = chance.random()
    if draw < 0.85:
        return _text(chance)
    return {"text": _text(chance)} if draw < 0.95 else chance.choice(_ODD)


def _value(chance: random.Random) -> Any:
    kind = chance.randint(0, 4)
    if kind == 0:
        return _text(chance)
    if kind == 1:
        return chance.choice(_NUMBERS)
    if kind == 2:
        return [_document(chance) for _ in range(chance.randint(0, 3))]
    if kind == 3:
        return {chance.choice(_FIELDS): _text(chance)}
    return chance.choice(_ODD)


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randint(0, len(data))]


def _flip(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data)) if data else 0
    return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]


def _insert(chance: random.Random, data: bytes) -> bytes:
    place = chance.randint(0, len(data))
    return data[:place] + chance.choice(_LITERALS) + data[place:]


def _replace_value(chance: random.Random, data: bytes) -> bytes:
    start = data.find(b": ", chance.randint(0, len(data)))
    end = data.find(b",", start)
    return data if min(start, end) < 0 else data[: start + 2] + chance.choice(_LITERALS) + data[end:]


_MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (_cut, _flip, _insert, _replace_value)
