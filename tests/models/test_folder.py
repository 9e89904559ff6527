"""What is read of a model folder, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen_rerank.errors import ModelCorruptError, ModelError, ModelIncompleteError, TokenizerError, UnsafeModelError
from qwen_rerank.models.folder import folder_digest, read_json, read_settings, read_tokenizer, weight_files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"9" * 10_000, "cannot be read as JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
    ],
)
def test_what_is_no_json_object_is_corrupt(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelCorruptError, match=rf"x\.json {message}"):
        read_json(tmp_path / "x.json")


def test_a_list_is_read_where_one_is_wanted(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    assert read_json(tmp_path / "x.json", list) == [1]


def test_a_file_without_end_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    (tmp_path / "tokenizer.json").symlink_to("x.json")
    with pytest.raises(ModelCorruptError, match="larger than"):
        read_json(tmp_path / "x.json")
    with pytest.raises(TokenizerError, match="larger than"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_pipe_or_a_device_is_never_waited_for(tmp_path):
    """Also not where a link of the folder leads to it."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "link.json"):
        with pytest.raises(ModelCorruptError, match="it is no regular file"):
            read_json(tmp_path / name)
    assert folder_digest(tmp_path)


def test_links_to_files_are_followed(tmp_path):
    """The hub's cache consists of them."""
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_settings(tmp_path) == {"a": 1}


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ModelIncompleteError, "has no config.json"),
        ({"model.gguf": ""}, ModelError, r"GGUF file \(model\.gguf\).*llama-server"),
        ({"config.json": "{}", "adapter_config.json": "{}"}, ModelIncompleteError, "merge it into its base model"),
        ({"config.json": '{"auto_map": {"AutoModel": "evil.M"}}'}, UnsafeModelError, "asks for code of its own"),
        ({"config.json": '{"_attn_implementation": "a/b"}'}, UnsafeModelError, "code from elsewhere"),
    ],
)
def test_what_is_no_whole_model_without_code_is_refused(tmp_path, files, error, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("pytorch_model.bin", UnsafeModelError, r"only as pytorch_model\.bin.*convert it to safetensors"),
        ("model.ckpt", UnsafeModelError, r"only as model\.ckpt"),
        ("model-q4.gguf", ModelError, r"GGUF file \(model-q4\.gguf\)"),
        ("README.md", ModelIncompleteError, "has no model.safetensors"),
    ],
)
def test_weights_are_safetensors_or_refused(tmp_path, name, error, message):
    (tmp_path / name).touch()
    with pytest.raises(error, match=message):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_shards_are_those_of_the_index(tmp_path):
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelIncompleteError, match=r"model-1\.safetensors is missing"):
        weight_files(tmp_path)
    for name in ("model-1.safetensors", "model-2.safetensors", "other.safetensors"):
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


def test_the_digest_is_that_of_the_content_and_not_of_the_place(tmp_path):
    digests = []
    for place, value in (("one", 0.0), ("two", 0.0), ("three", 1.0)):
        (tmp_path / place).mkdir()
        save_file({"w": np.full(8, value, np.float32)}, tmp_path / place / "model.safetensors")
        (tmp_path / place / "README.md").write_text(place)
        digests.append(folder_digest(tmp_path / place))
    assert digests[0] == digests[1] != digests[2]
