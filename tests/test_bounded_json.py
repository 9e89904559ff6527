"""Files of stores and model folders cost no more to read than they weigh, and are refused before a value is built."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import tracemalloc

import pytest

from qwen_rerank import bounded_json
from qwen_rerank.bounded_json import JsonLimitError, check_json, loads
from qwen_rerank.errors import InvalidInputError, ModelCorruptError, StoreError, TokenizerError
from qwen_rerank.models.folder import read_json, read_tokenizer, weight_names
from qwen_rerank.store.commits import read_commit_record
from qwen_rerank.store.errors import CorruptStoreError
from qwen_rerank.store.rows import Row, encode_metadata
from qwen_rerank.words import WordIndex
from tests.serve import costly

MOST_MEMORY = 9  # times the size: a text of Python's takes four bytes a character where one is wide, and is copied once
SMALL_BYTES = 16 << 20  # as much is left to any file
OBJECTS = b"[" + b"{}," * 100_000 + b"{}]"
DEEP = b"[" * 70_000 + b"]" * 70_000
DIGITS = b"[" + b"9" * 70_000 + b"]"


@pytest.fixture
def nothing_is_built(monkeypatch):
    monkeypatch.setattr(bounded_json.json, "loads", lambda *_: pytest.fail("values were built"))


def test_costly_json_of_a_file_is_read_or_refused_within_bounds(full):
    chance, worst = random.Random(17), (0.0, "")
    sizes = [*[200_000] * 18, 2_000_000, 8_000_000] if full else [100_000]
    gc.freeze()
    for number in range(2_000 if full else 50):
        kind, _, data = costly.body(chance, chance.choice(sizes))
        tracemalloc.start()
        with contextlib.suppress(ValueError):
            loads(data)
        share = tracemalloc.get_traced_memory()[1] / max(len(data), SMALL_BYTES // MOST_MEMORY)
        tracemalloc.stop()
        worst = max(worst, (share, f"{kind}, number {number}: {data[:60]!r}, {len(data)} bytes"))
    print(f"\ncostly files: {worst}")

    assert worst[0] <= MOST_MEMORY - 1  # the file's content itself came before


@pytest.mark.parametrize("data", [OBJECTS, DEEP, DIGITS], ids=["objects", "depth", "digits"])
def test_too_complex_a_file_of_a_model_is_refused_before_a_value_is_built(tmp_path, nothing_is_built, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ModelCorruptError, match=r"holds more than|deeper than|more than 400 digits"):
        read_json(tmp_path / "config.json")


def test_a_header_of_weights_too_complex_is_refused_before_a_value_is_built(tmp_path, nothing_is_built):
    (tmp_path / "model.safetensors").write_bytes(len(OBJECTS).to_bytes(8, "little") + OBJECTS)
    with pytest.raises(ModelCorruptError, match="a header that cannot be read"):
        weight_names(tmp_path)


def test_a_tokenizer_may_be_large_but_not_without_end(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {f"token {i}": i for i in range(150_000)}}}))
    assert read_tokenizer(path)

    path.write_bytes(b"[" + b"0," * 4_000_001 + b"0]")
    with pytest.raises(TokenizerError, match="more than 4000000 values"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    "data", [OBJECTS, DEEP, DIGITS, b'{"check":' + b'"x",' * 50_000], ids=["objects", "depth", "digits", "cut"]
)
def test_of_a_commit_record_no_more_is_read_than_one_has(tmp_path, data):
    (tmp_path / "commit.json").write_bytes(data * 10)
    tracemalloc.start()
    with pytest.raises(CorruptStoreError, match="it is not a commit record"):
        read_commit_record(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < SMALL_BYTES


def test_metadata_too_complex_is_refused_when_it_comes_and_when_it_is_read():
    """The second where a store was made elsewhere."""
    with pytest.raises(InvalidInputError, match=r"documents\[0\]\.metadata holds more than 100000 values"):
        encode_metadata("documents[0].metadata", {"all": [0] * 100_001})
    with pytest.raises(StoreError, match="the metadata of document 'a' holds more than 100000 values"):
        Row(1, b"a", b"text", OBJECTS, None).document()


@pytest.mark.parametrize("length", [10**12, -1, "5", None])
def test_a_length_that_an_index_of_words_says_and_has_not_costs_nothing(tmp_path, length):
    path = tmp_path / "words.bin"
    index = WordIndex()
    index.write(path)
    head = json.loads(path.read_bytes().split(b"\n")[0])
    path.write_bytes(json.dumps({**head, "lengths": [length] * 8}).encode() + b"\n")

    with pytest.raises((ValueError, TypeError)):
        index.read(path)


def test_keys_are_counted_and_what_is_in_texts_is_not():
    assert check_json(b'{"a": 1, "b,c:[{": {"d": "\\":\\\\"}}') == 3
    with pytest.raises(JsonLimitError) as caught:
        check_json(b"[1,2,3,4]", max_values=3)
    assert caught.value.code == "too_many_values"
