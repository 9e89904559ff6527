"""What an opened checkpoint holds, and where names lead."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qwen_rerank.errors import InvalidInputError, ModelCorruptError, ModelError, TokenizerError
from qwen_rerank.prompt import PromptSpec
from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint, weights_sha256
from tests.checkpoints import small_checkpoint, write_weights

KINDS = ("tied", "untied", "seq-cls")


@pytest.fixture
def folder(tmp_path):
    return small_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_stored_ones_without_the_head(tmp_path, kind):
    folder = small_checkpoint(tmp_path / "m", kind=kind, dtype=torch.bfloat16)
    checkpoint, stored = load_checkpoint(str(folder)), load_file(folder / "model.safetensors")
    assert (
        set(stored) - set(checkpoint.weights)
        == {"tied": set(), "untied": {"lm_head.weight"}, "seq-cls": {"score.weight"}}[kind]
    )
    assert all(torch.equal(tensor, stored[name]) for name, tensor in checkpoint.weights.items())
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_read_from_the_real_output_rows(tmp_path, kind):
    folder = small_checkpoint(tmp_path / "m", kind=kind)
    checkpoint, stored = load_checkpoint(str(folder)), load_file(folder / "model.safetensors")
    yes, no = checkpoint.tokenizer.single_id("yes"), checkpoint.tokenizer.single_id("no")
    rows = stored[{"tied": "model.embed_tokens.weight", "untied": "lm_head.weight", "seq-cls": "score.weight"}[kind]]
    expected = rows[0] if kind == "seq-cls" else rows[yes] - rows[no]
    assert torch.equal(checkpoint.head, expected)
    assert checkpoint.head.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_5_saves_loads_the_same(tmp_path, kind):
    """Another place for rope_theta, a dtype key, a layer list: the same model."""
    folder = small_checkpoint(tmp_path / "m", kind=kind)
    loader = AutoModelForSequenceClassification if kind == "seq-cls" else AutoModelForCausalLM
    saved = tmp_path / "saved"
    loader.from_pretrained(folder).save_pretrained(saved)
    shutil.copy(folder / "tokenizer.json", saved)
    assert "rope_parameters" in json.loads((saved / "config.json").read_text())
    assert load_checkpoint(str(saved)).fingerprint == load_checkpoint(str(folder)).fingerprint


def test_shards_and_place_do_not_change_the_fingerprint(tmp_path, folder):
    sharded = small_checkpoint(tmp_path / "elsewhere" / "n", shards=3)
    assert load_checkpoint(str(sharded)).fingerprint == load_checkpoint(str(folder)).fingerprint
    assert len(list(sharded.glob("*.safetensors"))) == 3


def _change_weight(name):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[0] += 1
        write_weights(folder, weights)

    return change


def _change_json(file, **values):
    def change(folder):
        path = folder / file
        data = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps({**data, **values}))

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_change_weight("model.embed_tokens.weight"), id="embedding"),
        pytest.param(_change_weight("model.layers.1.mlp.down_proj.weight"), id="layer"),
        pytest.param(_change_weight("model.norm.weight"), id="norm"),
        pytest.param(_change_json("config.json", rms_norm_eps=1e-5), id="config"),
        pytest.param(_change_json("qwen_rerank.json", instruction="Find code."), id="instruction"),
        pytest.param(_change_json("tokenizer.json"), id="tokenizer"),
    ],
)
def test_the_fingerprint_changes_with_the_checkpoint(folder, change):
    before = load_checkpoint(str(folder)).fingerprint
    change(folder)
    assert load_checkpoint(str(folder)).fingerprint != before


def test_a_stored_copy_of_a_tied_head_is_fine_if_identical(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    before = load_checkpoint(str(folder)).fingerprint
    write_weights(folder, weights)
    assert load_checkpoint(str(folder)).fingerprint == before
    weights["lm_head.weight"][0, 0] += 1
    write_weights(folder, weights)
    with pytest.raises(ModelError, match="is stored and differs"):
        load_checkpoint(str(folder))


def test_weights_are_mapped_and_not_read(tmp_path):
    """Opening 96 MB of weights takes less than half of that in memory."""
    folder = small_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 250_000}))
    weights = load_file(folder / "model.safetensors")
    for i in range(2):
        for name, shape in (("gate", (250_000, 16)), ("up", (250_000, 16)), ("down", (16, 250_000))):
            weights[f"model.layers.{i}.mlp.{name}_proj.weight"] = torch.ones(shape)
    write_weights(folder, weights)
    code = (
        "import resource, sys\nfrom qwen_rerank.scorers.qwen.checkpoint import load_checkpoint\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = used(); checkpoint = load_checkpoint(sys.argv[1]); print(used() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert (folder / "model.safetensors").stat().st_size > 96_000_000
    assert int(done.stdout) < 48


def test_weights_sha256_is_that_of_the_file(folder):
    assert weights_sha256(folder) == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(InvalidInputError, match="sha256"):
        load_checkpoint(str(folder), sha256="abc")
    assert load_checkpoint(str(folder), sha256=weights_sha256(folder)).name == str(folder)


def test_one_flipped_bit_is_found_by_its_sha256(folder):
    """The fingerprint samples; the digest reads everything."""
    path = folder / "model.safetensors"
    digest, content = weights_sha256(folder), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelCorruptError, match="SHA-256"):
        load_checkpoint(str(folder), sha256=digest)


def test_a_checkpoint_may_bring_its_own_prompt(folder):
    own = {"separator": " ", "document_label": "Text: ", "yes": "no", "no": "yes", "instruction": "Find code."}
    plain = load_checkpoint(str(folder))
    (folder / "qwen_rerank.json").write_text(json.dumps(own))
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.prompt_spec("vllm") == PromptSpec(separator=" ", document_label="Text: ", yes="no", no="yes")
    assert checkpoint.instruction == "Find code."
    assert torch.equal(checkpoint.head, -plain.head)
    assert (plain.prompt_spec("vllm"), plain.instruction) == (PromptSpec(separator="\n\n"), None)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"sufix": "x"}, "unknown key 'sufix'; the keys are prefix, suffix, separator"),
        ({"yes": 1}, "yes must be a string"),
        ({"yes": "no"}, "two different labels"),
        ({"document_label": ""}, "a place where a word ends"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_prompt_file_is_strictly_checked(folder, own, message):
    (folder / "qwen_rerank.json").write_text(json.dumps(own))
    with pytest.raises(ModelCorruptError, match=rf"qwen_rerank\.json.*{message}"):
        load_checkpoint(str(folder))


def test_labels_of_a_prompt_file_must_be_single_tokens(folder):
    (folder / "qwen_rerank.json").write_text('{"yes": "relevant"}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: 'relevant' must be exactly one token"):
        load_checkpoint(str(folder))


def test_a_folder_of_sentence_transformers_must_agree_on_the_labels(folder):
    checkpoint = load_checkpoint(str(folder))
    yes, no = checkpoint.tokenizer.single_id("yes"), checkpoint.tokenizer.single_id("no")
    (folder / "1_LogitScore").mkdir()
    path = folder / "1_LogitScore" / "config.json"
    path.write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
    assert load_checkpoint(str(folder)).fingerprint == checkpoint.fingerprint
    path.write_text(json.dumps({"true_token_id": no, "false_token_id": yes}))
    with pytest.raises(ModelError, match="name the labels"):
        load_checkpoint(str(folder))


def test_links_out_of_a_hub_cache_are_followed(tmp_path, folder):
    """A snapshot is a folder of links into the cache's blobs."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(Path("../..") / folder.name / file.name)
    assert load_checkpoint(str(snapshot)).fingerprint == load_checkpoint(str(folder)).fingerprint
