"""A name is enough: what leads to which scorer, and what is no reranker."""

from __future__ import annotations

import json
import subprocess
import sys

import huggingface_hub
import pytest

from qwen_rerank import CrossEncoderScorer, HttpScorer, QwenScorer, Reranker, load_scorer
from qwen_rerank.errors import InvalidInputError, ModelError, ModelIncompleteError, ModelNotFoundError, UnsafeModelError
from qwen_rerank.models.names import PINNED
from qwen_rerank.scorers.loading import check_model, scorer_kind
from tests.checkpoints import small_checkpoint
from tests.scorers.cross_encoders import make_bert

CAUSAL = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def write(folder, **files):
    """Write a folder of small files; a dict or list becomes JSON, and `__` in a name stands for a dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("kind", ["tied", "untied", "seq-cls"])
def test_a_qwen_checkpoint_is_scored_with_its_prompt(tmp_path, kind):
    """Also the conversion to a sequence classifier, which would score without a prompt, too, and mean nothing by it."""
    with load_scorer(str(small_checkpoint(tmp_path / "m", kind=kind)), device="cpu", max_length=300) as scorer:
        assert isinstance(scorer, QwenScorer)
        assert scorer.max_length == 300


def test_a_classifier_with_one_label_is_a_cross_encoder(tmp_path):
    scorer = load_scorer(str(make_bert(tmp_path / "m")), device="cpu", max_length=20, dtype="float32")
    assert isinstance(scorer, CrossEncoderScorer)
    assert (scorer.config.max_length, scorer.config.dtype) == (20, "float32")


def test_an_address_is_a_server():
    scorer = load_scorer("http://127.0.0.1:9", dialect="tei", api_key="secret", instruction=None)
    assert isinstance(scorer, HttpScorer)
    assert (scorer.config.url, scorer.config.dialect) == (("http://127.0.0.1:9",), "tei")


def test_a_reranker_takes_a_name():
    assert Reranker("pocket").rerank("apple", ["a pear", "an apple"])[0].document.text == "an apple"


def test_official_names_need_no_look(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    assert {scorer_kind(name) for name in PINNED} == {"qwen"}


def test_a_hub_model_is_told_by_small_files_alone(monkeypatch, tmp_path):
    folder = write(tmp_path / "m", config__json={"architectures": ["BertForSequenceClassification"]})
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.extend(options["allow_patterns"]) or folder
    )
    assert scorer_kind("someone/cross-encoder") == "cross-encoder"
    assert not any("safetensors" in pattern or pattern == "*" for pattern in asked)


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": CAUSAL, "qwen_rerank__json": {}},
        {"config__json": CAUSAL | {"vocab_size": 151_669, "max_position_embeddings": 40_960}},
        {"config__json": CAUSAL, "chat_template__jinja": "Judge whether the Document meets the requirements …"},
        {"config__json": CAUSAL, "modules__json": [{"type": "a.Transformer"}, {"type": "a.LogitScore"}]},
    ],
    ids=["our own mark", "official sizes", "chat template", "sentence-transformers"],
)
def test_a_causal_model_that_says_it_was_trained_to_rerank_is_taken(tmp_path, files):
    assert scorer_kind(write(tmp_path / "m", **files)) == "qwen"


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ModelIncompleteError, "has no config.json"),
        ({"config__json": CAUSAL}, ModelError, r"answers yes or no.*qwen_rerank\.json with \{\}"),
        ({"config__json": {"architectures": ["BertModel"]}}, ModelError, "is a BertModel and no reranker"),
        ({"config__json": {}}, ModelError, "is a model of no kind and no reranker"),
        ({"config__json": CAUSAL | {"auto_map": {"a": "b.C"}}}, UnsafeModelError, "code of its own"),
        ({"config__json": CAUSAL, "adapter_config__json": {}}, ModelIncompleteError, "merge it into its base model"),
        ({"model__gguf": ""}, ModelError, "llama-server and give that server's URL"),
        (
            {"config__json": CAUSAL, "modules__json": [{"type": "s.Transformer"}, {"type": "s.Pooling"}]},
            ModelError,
            r"is an embedding model \(Pooling\).*load_embedder",
        ),
    ],
)
def test_what_is_no_reranker_is_refused_with_the_way_out(tmp_path, files, error, message):
    with pytest.raises(error, match=message):
        load_scorer(write(tmp_path / "m", **files))


@pytest.mark.parametrize("name", ["", " ", None, 7])
def test_a_name_must_be_a_text(name):
    with pytest.raises(InvalidInputError, match="name"):
        load_scorer(name)


def test_a_name_that_leads_nowhere_is_not_found():
    with pytest.raises(ModelNotFoundError, match="no folder and no hub name"):
        load_scorer("no-such-model")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("http://127.0.0.1:9", {"device": "cuda"}, "device is not for a rerank server"),
        ("http://127.0.0.1:9", {"deterministic": True}, "deterministic is not for a rerank server"),
        (
            "pocket",
            {"api_key": "secret"},
            "api_key is not for a Qwen3-Reranker checkpoint, which pocket is; leave it out",
        ),
        ("pocket", {"max_length": 0}, "max_length must be an integer of at least 1"),
        ("pocket", {"revision": "main"}, "for hub names only"),
    ],
)
def test_an_argument_that_is_wrong_or_for_something_else_is_named(name, options, message):
    with pytest.raises(InvalidInputError, match=message) as raised:
        load_scorer(name, **options)
    assert "secret" not in str(raised.value)


def test_a_cross_encoder_takes_no_instruction(tmp_path):
    with pytest.raises(InvalidInputError, match="instruction is not for a cross-encoder"):
        load_scorer(str(make_bert(tmp_path / "m")), instruction="Find code.")


def test_a_model_can_be_checked_without_loading_it(tmp_path):
    """Also its weights' files, which the kind alone does not tell."""
    for name, folder in (("qwen", small_checkpoint(tmp_path / "q")), ("cross-encoder", make_bert(tmp_path / "c"))):
        assert check_model(str(folder)) == name
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelIncompleteError, match=r"no model\.safetensors"):
            check_model(str(folder))


def test_telling_a_server_or_a_refusal_loads_no_torch():
    code = (
        "import sys\nfrom qwen_rerank.scorers.loading import scorer_kind\nscorer_kind('http://a')\nscorer_kind('pocket')\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"threads": 0}, {"dialect": "tei"}])
def test_a_model_is_checked_with_the_options_that_it_is_to_be_loaded_with(options):
    assert check_model("mini", device="auto", threads=1) == "cross-encoder"
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        check_model("mini", **options)
