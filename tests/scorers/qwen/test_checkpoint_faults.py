"""Every broken, foreign or unsafe checkpoint is a typed error that names the file; none is ever served."""

from __future__ import annotations

import ast
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwen_rerank
from qwen_rerank.errors import (
    InvalidInputError,
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    ModelNotFoundError,
    TokenizerError,
    UnsafeModelError,
)
from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint
from tests.checkpoints import small_checkpoint, write_weights

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return small_checkpoint(tmp_path / "m")


@pytest.fixture
def sharded(tmp_path):
    return small_checkpoint(tmp_path / "m", shards=3)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    write_weights(folder, weights)


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_a_name_must_be_a_text(name):
    with pytest.raises(InvalidInputError, match="model"):
        load_checkpoint(name)


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json, tokenizer\.json and weights are missing"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelIncompleteError, match=name):
        load_checkpoint(str(folder))


def test_an_adapter_alone_says_to_merge_it(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelIncompleteError, match="merge it into its base model"):
        load_checkpoint(str(folder))


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelIncompleteError, match=r"model-00002-of-00003\.safetensors is missing"):
        load_checkpoint(str(sharded))


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3, ""])
def test_an_index_must_not_reach_outside_its_folder(sharded, place):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelCorruptError, match="not the name of a safetensors file"):
        load_checkpoint(str(sharded))


def test_an_index_and_its_shards_must_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    places = index["weight_map"]
    places["model.norm.weight"] = next(place for place in places.values() if place != places["model.norm.weight"])
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelIncompleteError, match="disagree"):
        load_checkpoint(str(sharded))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_map_is_corrupt(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(ModelCorruptError, match="index"):
        load_checkpoint(str(sharded))


def test_truncated_weights_are_corrupt_at_every_length(folder):
    path = folder / WEIGHTS
    content = path.read_bytes()
    for keep in [0, 1, 7, 8, 9, *range(100, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:keep])
        with pytest.raises(ModelCorruptError, match=r"model\.safetensors cannot be read"):
            load_checkpoint(str(folder))


@pytest.mark.parametrize("length", [b"\xff" * 7 + b"\x7f", b"\xff" * 8, b"\x00" * 8, b"\x00\x00\x00\x40" + b"\x00" * 4])
def test_an_absurd_header_takes_no_memory(folder, length):
    path = folder / WEIGHTS
    path.write_bytes(length + path.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelCorruptError, match="cannot be read as safetensors"):
        load_checkpoint(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("kind", ["tied", "untied", "seq-cls"])
def test_every_weight_is_needed(tmp_path, kind):
    folder = small_checkpoint(tmp_path / "m", kind=kind, layers=1)
    weights = load_file(folder / WEIGHTS)
    for name in weights:
        write_weights(folder, {other: tensor for other, tensor in weights.items() if other != name})
        with pytest.raises(ModelIncompleteError, match=f"(?s){name}.*nothing is ever filled in at random"):
            load_checkpoint(str(folder))


@pytest.mark.parametrize("kind", ["tied", "untied", "seq-cls"])
def test_every_weight_must_have_its_shape(tmp_path, kind):
    folder = small_checkpoint(tmp_path / "m", kind=kind, layers=1)
    weights = load_file(folder / WEIGHTS)
    for name, tensor in weights.items():
        write_weights(folder, weights | {name: tensor[:-1].clone() if tensor.shape[0] > 1 else tensor[:, 1:].clone()})
        with pytest.raises(ModelIncompleteError, match=rf"{name} has shape"):
            load_checkpoint(str(folder))


@pytest.mark.parametrize(
    "name", ["score.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_an_unexpected_weight_is_refused(folder, name):
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(1, 16)}))
    with pytest.raises(ModelIncompleteError, match=f"1 unexpected weights, first {name}"):
        load_checkpoint(str(folder))


def test_quantized_weights_are_refused(folder):
    change_weights(folder, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelCorruptError, match="stored as torch"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_head_that_cannot_score_is_refused(tmp_path, value):
    folder = small_checkpoint(tmp_path / "m", kind="seq-cls")
    change_weights(folder, lambda weights: weights["score.weight"].fill_(value))
    with pytest.raises(ModelCorruptError, match="zero or not finite"):
        load_checkpoint(str(folder))


def test_pickled_weights_are_refused_and_never_opened(folder, tmp_path):
    canary = tmp_path / "executed"

    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    (folder / WEIGHTS).unlink()
    torch.save(Canary(), folder / "pytorch_model.bin")
    with pytest.raises(UnsafeModelError, match=r"only as pytorch_model\.bin.*convert it to safetensors"):
        load_checkpoint(str(folder))
    assert not canary.exists()


def test_code_in_the_folder_is_refused_or_ignored_and_never_run(folder, tmp_path):
    canary = tmp_path / "executed"
    (folder / "modeling_qwen3.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.popen('true') }}")
    load_checkpoint(str(folder))
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_qwen3.Evil"})
    with pytest.raises(UnsafeModelError, match=r"config\.json asks for code of its own"):
        load_checkpoint(str(folder))
    assert not canary.exists()


def test_no_source_file_runs_foreign_code():
    """Nothing in the package unpickles, evaluates, or trusts a checkpoint's code."""
    forbidden = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads"}
    for path in Path(qwen_rerank.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, path
                trusting = [
                    word for word in node.keywords if word.arg in {"trust_remote_code", "shell", "allow_pickle"}
                ]
                assert all(isinstance(word.value, ast.Constant) and not word.value.value for word in trusting), path


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"a": NaN'])
def test_a_config_that_is_no_object_is_corrupt(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelCorruptError, match=r"config\.json"):
        load_checkpoint(str(folder))


def test_a_config_without_end_is_not_read(folder):
    with (folder / "config.json").open("r+") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(ModelCorruptError, match="larger than"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"architectures": ["Qwen3Model"]}, "a reranker is one of Qwen3ForCausalLM"),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": [["x"]]}, "architectures is"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"hidden_act": "gelu"}, "hidden_act 'silu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"layer_types": 3}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling \\('yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling \\('linear'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0"),
        ({"rope_theta": None}, "rope_theta must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a number"),
        ({"hidden_size": -16}, "hidden_size must be an integer from 1"),
        ({"hidden_size": 2**62}, "hidden_size must be an integer from 1"),
        ({"hidden_size": 16.0}, "hidden_size must be an integer from 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "must be even"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
    ],
)
def test_a_config_that_would_score_otherwise_is_refused(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(ModelError, match=rf"config\.json.*{message}"):
        load_checkpoint(str(folder))


def test_a_classifier_with_two_labels_is_no_reranker(tmp_path):
    folder = small_checkpoint(tmp_path / "m", kind="seq-cls")
    change_config(folder, id2label={"0": "no", "1": "yes"})
    with pytest.raises(ModelError, match="the head has 2 labels"):
        load_checkpoint(str(folder))


def test_a_config_that_ties_an_untied_head_is_refused(tmp_path):
    folder = small_checkpoint(tmp_path / "m", kind="untied")
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(ModelIncompleteError, match="set tie_word_embeddings to false"):
        load_checkpoint(str(folder))


def test_a_tokenizer_of_another_vocabulary_is_refused(folder):
    change_config(folder, vocab_size=200)
    with pytest.raises(TokenizerError, match=r"ids up to 263, but config\.json gives the model 200 embeddings"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{}", b'{"model": {"type": "BPE"}}'])
def test_a_corrupt_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"m/tokenizer\.json"):
        load_checkpoint(str(folder))


def test_random_damage_to_small_files_is_always_our_error(folder, full):
    """Single-byte changes, by `--full` a thousand: the checkpoint opens, or raises a ModelError; nothing else escapes."""
    generator = torch.Generator().manual_seed(0)
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        for _ in range(333 if full else 60):
            place, value = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(content), 6000), 256))
            (folder / name).write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                load_checkpoint(str(folder))
            except ModelError:
                continue
        (folder / name).write_bytes(content)
