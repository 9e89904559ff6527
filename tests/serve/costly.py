"""Bodies made to cost far more than they weigh, each filled up to about a given number of bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from tests.serve.grammar import PATHS

_LISTS = ("documents", "texts", "passages", "queries", "items", "text_1", "text_2")
_ITEMS = (
    b"1", b"null", b"{}", b"[]", b'""', b'"a"', b"true", b"-0.5", b"[[]]", b'{"text":1}', b'{"text":""}', b'{"a":{}}', b"1e5",
    b'"\\n"', b'"\\u4e2d"', b'"\\\\"', b'"\\""', b'{"":0}', b"[0,0]",
)  # fmt: skip
_LETTERS = (
    b"x", b" ", b"word ", b"\\n", b"\\\\", b'\\"', b"\\u0000", b"\\u4e2d", b"\\ud83d\\ude00", b"\\ud800", b"\xe4\xb8\xad", b"\xf0\x9f\x98\x80",
    b"\xc3\xa9", b"\xff", b"{", b"\\/",
)  # fmt: skip
_NUMBERS = (b"9", b"0", b"1.", b"0.0", b"1e", b"-", b"12345678901234567890")
_NOISE = (b"]", b"}", b",", b":", b'"', b"\\", b" ", b"[", b"{", b"1 ", b'{"a":', b"[[],", b'"",', b'"\\\\",', b"//")
_TEXT_FIELDS = ("query", "model", "instruction", "kwargs", "chat_template_kwargs", "top_n", "unknown")


def body(chance: random.Random, n_bytes: int) -> tuple[str, str, bytes]:
    """Return what is costly about a body, a path to send it to, and the body."""
    make = chance.choice(_KINDS)
    return make.__name__.strip("_"), chance.choice(PATHS), make(chance, n_bytes)


def _around(chance: random.Random, name: str, value: bytes) -> bytes:
    """Return an otherwise right request with this value."""
    fields = {
        "query": b'"q"',
        "documents": b'["a"]',
        **({"text_1": b'"q"', "text_2": b'["a"]'} if chance.random() < 0.2 else {}),
    }
    if name in _LISTS and name != "documents":
        del fields["documents"]
    fields[name] = value
    return b"{" + b",".join(b'"%s":%s' % (key.encode(), each) for key, each in fields.items()) + b"}"


def _many_items(chance: random.Random, n_bytes: int) -> bytes:
    item = chance.choice(_ITEMS)
    return _around(chance, chance.choice(_LISTS), b"[" + b",".join([item] * (n_bytes // (len(item) + 1))) + b"]")


def _mixed_items(chance: random.Random, n_bytes: int) -> bytes:
    items = chance.choices(_ITEMS, k=n_bytes // 6)
    return _around(chance, chance.choice(_LISTS), b"[" + b",".join(items) + b"]")


def _as_many_as_allowed(chance: random.Random, n_bytes: int) -> bytes:
    item = b'"' + b"x" * (n_bytes // 1_000) + chance.choice(_LETTERS) + b'"'
    return _around(chance, chance.choice(_LISTS), b"[" + b",".join([item] * 1_000) + b"]")


def _pairs(chance: random.Random, n_bytes: int) -> bytes:
    texts = b"[" + b",".join([chance.choice(_ITEMS)] * (n_bytes // 8)) + b"]"
    return b'{"text_1":%s,"text_2":%s}' % (texts, texts)


def _long_text(chance: random.Random, n_bytes: int) -> bytes:
    letter = chance.choice(_LETTERS)
    text = b'"' + letter * (n_bytes // len(letter)) + chance.choice((b"", *_LETTERS)) + b'"'
    name = chance.choice((*_LISTS, *_TEXT_FIELDS))
    return _around(chance, name, b"[" + text + b"]" if name in _LISTS else text)


def _one_wide_character(chance: random.Random, n_bytes: int) -> bytes:
    text = b'"' + b"x" * n_bytes + chance.choice((b"", b"\\n")) + "😀".encode() + b'"'
    name = chance.choice((*_LISTS, *_TEXT_FIELDS))
    return _around(chance, name, b"[" + text + b"]" if name in _LISTS else text)


def _nesting(chance: random.Random, n_bytes: int) -> bytes:
    start, stop = chance.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")))
    depth = chance.choice((10, 60, 65, 1_000, n_bytes // (len(start) + len(stop))))
    one = start * depth + b"0" + stop * depth
    return _around(chance, "unknown", b"[" + b",".join([one] * max(1, n_bytes // len(one))) + b"]")


def _long_keys(chance: random.Random, n_bytes: int) -> bytes:
    length = chance.choice((1, 10, 1_000, n_bytes))
    keys = (f"{place}" + chance.choice("ké😀") * length for place in range(max(1, n_bytes // (length + 8))))
    inner = json.dumps(dict.fromkeys(keys, 0), ensure_ascii=chance.random() < 0.5).encode()
    return _around(chance, "unknown", inner) if chance.random() < 0.5 else inner


def _same_key(chance: random.Random, n_bytes: int) -> bytes:
    pair = chance.choice((b'"a":0,', b'"query":"q",', b'"documents":["a"],', b'"":{},'))
    return b"{" + pair * (n_bytes // len(pair)) + b'"query":"q","documents":["a"]}'


def _long_numbers(chance: random.Random, n_bytes: int) -> bytes:
    digits = chance.choice(_NUMBERS)
    length = chance.choice((300, 401, 5_000, n_bytes))
    number = (digits * (length // len(digits) + 1))[:length]
    return _around(
        chance, chance.choice(("top_n", "unknown")), b"[" + b",".join([number] * max(1, n_bytes // length)) + b"]"
    )


def _json_in_a_text(chance: random.Random, n_bytes: int) -> bytes:
    inner = chance.choice((_many_items, _nesting, _long_keys, _long_numbers, _same_key))(chance, n_bytes)
    return _around(chance, "kwargs", json.dumps(inner.decode("utf-8", "replace")).encode())


def _noise(chance: random.Random, n_bytes: int) -> bytes:
    part = b"".join(chance.choices(_NOISE, k=chance.randint(1, 3)))
    return chance.choice((b"", b'{"query":"q","documents":["a"],"x":', b'{"documents":[')) + part * (
        n_bytes // len(part)
    )


def _white_space(chance: random.Random, n_bytes: int) -> bytes:
    return _around(chance, "unknown", chance.choice((b" ", b"\n", b" \t\r\n")) * (n_bytes // 4) + b"0")


_KINDS: tuple[Callable[[random.Random, int], bytes], ...] = (
    _many_items, _mixed_items, _as_many_as_allowed, _pairs, _long_text, _one_wide_character, _nesting, _long_keys, _same_key,
    _long_numbers, _json_in_a_text, _noise, _white_space,
)  # fmt: skip


def answer(chance: random.Random, n_bytes: int, n_documents: int) -> tuple[str, int, bytes]:
    """Return what is costly about a back end's answer to a request for scores, its status, and its body."""
    make = chance.choice((*_ANSWERS, *_KINDS))
    status = chance.choice((200, 200, 200, 200, 400, 413, 422, 500))
    if make in _KINDS:
        return make.__name__.strip("_"), status, make(chance, n_bytes)
    return make.__name__.strip("_"), status, make(chance, n_bytes, n_documents)


def _results(results: list[bytes]) -> bytes:
    return b'{"results":[' + b",".join(results) + b"]}"


def _repeated_texts(chance: random.Random, n_bytes: int, n_documents: int) -> bytes:
    letter = chance.choice(_LETTERS)
    text = letter * (n_bytes // n_documents // len(letter))
    one = b'{"index":%d,"relevance_score":0.5,"document":{"text":"%s"}}'
    return _results([one % (index, text) for index in range(n_documents)])


def _further_fields(chance: random.Random, n_bytes: int, n_documents: int) -> bytes:
    item = chance.choice(_ITEMS)
    more = b",".join([item] * (n_bytes // n_documents // (len(item) + 1)))
    return _results([b'{"index":%d,"score":0.5,"more":[%s]}' % (index, more) for index in range(n_documents)])


def _many_results(chance: random.Random, n_bytes: int, _: int) -> bytes:
    one = chance.choice((b'{"index":0,"score":1}', b'{"index":"0"}', b'{"logprobs":{"top_logprobs":[{"a":-1}]}}'))
    return _results([one] * (n_bytes // (len(one) + 1)))


def _long_scores(chance: random.Random, n_bytes: int, n_documents: int) -> bytes:
    digits = chance.choice(_NUMBERS) * (n_bytes // n_documents // 8)
    return _results([b'{"index":%d,"score":0.%s}' % (index, digits) for index in range(n_documents)])


def _long_errors(chance: random.Random, n_bytes: int, _: int) -> bytes:
    error = b'{"loc":["body","documents",%d],"msg":"%s","input":"' + chance.choice(_LETTERS) * 50 + b'"}'
    errors = [error % (number, b"too long") for number in range(n_bytes // (len(error) + 8))]
    return b'{"detail":[' + b",".join(errors) + b"]}"


def _many_models(chance: random.Random, n_bytes: int, _: int) -> bytes:
    card = b'{"id":"%s","owned_by":"vllm","max_model_len":%d}' % (b"m" * chance.choice((1, 100, 4_000)), 10**9)
    return b'{"data":[' + b",".join([card] * (n_bytes // (len(card) + 1))) + b"]}"


_ANSWERS: tuple[Callable[[random.Random, int, int], bytes], ...] = (
    _repeated_texts, _further_fields, _many_results, _long_scores, _long_errors, _many_models,
)  # fmt: skip
