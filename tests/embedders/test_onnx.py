"""Sentence embeddings from an ONNX graph are those of the encoder in torch, and need no torch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from qwen_rerank import Embedder, FaissStore, load_embedder
from qwen_rerank.embedders.onnx import OnnxEmbedder
from qwen_rerank.errors import (
    InvalidInputError,
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    ModelNotFoundError,
)
from tests.scorers.cross_encoders import make_bert, make_roberta

TEXTS = ["a red cat", "red", "北京 the cat, and. 量子纠缠", "Ünknown Ωords", "red cat. " * 60]
KINDS = {"bert": make_bert, "roberta": make_roberta}


def export(folder, output="last_hidden_state"):
    """Write the encoder's graph, which gives a state for each token, or with "embeddings" the first token's."""
    network = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, input_ids, attention_mask):
            states = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return states if output == "last_hidden_state" else states[:, 0]

    rows = {0: "batch", 1: "sequence"}
    (folder / "onnx").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            States(),
            tuple(torch.ones(2, 7, dtype=torch.long) for _ in range(2)),
            folder / "onnx/model.onnx",
            input_names=["input_ids", "attention_mask"],
            output_names=[output],
            dynamic_axes={
                "input_ids": rows,
                "attention_mask": rows,
                output: rows if output == "last_hidden_state" else {0: "batch"},
            },
            opset_version=17,
            dynamo=False,
        )


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = KINDS[request.param](tmp_path_factory.mktemp("models") / request.param)
    export(path)
    prompts = {"prompts": {"query": "cat: ", "document": "red: "}}
    (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return path


@pytest.fixture
def copy(tmp_path):
    """A folder of one's own, to break, without weights."""
    path = make_bert(tmp_path / "m")
    export(path)
    (path / "model.safetensors").unlink()
    return path


def in_torch(folder, texts, prompt, *, first=False):
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        given = tokenizer(prompt + text, return_tensors="pt", truncation=True, max_length=48)
        with torch.inference_mode():
            states = network(**given).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(states[0] if first else states.mean(0), dim=0).numpy())
    return np.stack(rows)


def test_vectors_are_those_of_the_encoder_with_each_prompt(folder):
    embedder = OnnxEmbedder(folder, batch_size=2)

    assert isinstance(embedder, Embedder)
    assert (embedder.dim, embedder.max_length) == (32, 48)
    np.testing.assert_allclose(embedder.embed_queries(TEXTS), in_torch(folder, TEXTS, "cat: "), atol=1e-5)
    np.testing.assert_allclose(embedder.embed_documents(TEXTS), in_torch(folder, TEXTS, "red: "), atol=1e-5)


def test_an_empty_text_has_no_vector_and_no_list_no_rows(folder):
    embedder = OnnxEmbedder(folder)

    assert not embedder.embed_documents(["", "  ", "red"])[:2].any()
    assert embedder.embed_documents([]).shape == (0, 32)
    with pytest.raises(InvalidInputError, match=r"texts\[0\]"):
        embedder.embed_documents([7])


def test_a_text_is_read_behind_white_space_and_long_words(copy):
    embedder = OnnxEmbedder(copy)
    assert not embedder.embed_documents(["\u200b\0"]).any()
    for beginning in (" " * 5000, "q" * 5000 + " "):
        cat, red = embedder.embed_documents([beginning + "cat", beginning + "red"])
        assert np.abs(cat - red).max() > 1e-3
    np.testing.assert_allclose(
        embedder.embed_documents([" " * 5000 + "cat"]), embedder.embed_documents(["cat"]), atol=1e-6
    )


def test_control_tokens_in_a_text_are_its_characters(folder):
    embedder = OnnxEmbedder(folder)
    ids = embedder._tokenizer.encode("red [SEP] </s> cat").ids
    [begin, end] = embedder._tokenizer.encode("").ids

    assert [i for i in ids if i in (begin, end)] == [begin, end]


def test_prompts_of_the_tokenizers_template_stand_before_queries_and_documents(copy):
    """A query is a single text of the template, a document the second of a pair."""
    file = copy / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    parts = data["post_processor"]["special_tokens"]
    for name in ("cat", "red"):
        ids = [data["model"]["vocab"][piece] for piece in ("[CLS]", name[0], f"##{name[1]}", f"##{name[2]}")]
        parts[name] = {"id": name, "ids": ids, "tokens": ["[CLS]", *name]}

    def around(prompt, text, side):
        special = [{"SpecialToken": {"id": part, "type_id": side}} for part in (prompt, "[SEP]")]
        return [special[0], {"Sequence": {"id": text, "type_id": side}}, special[1]]

    data["post_processor"]["single"] = around("cat", "A", 0)
    data["post_processor"]["pair"] = [*around("cat", "A", 0), *around("red", "B", 1)]
    file.write_text(json.dumps(data), encoding="utf-8")
    make_bert(copy.parent / "weights")
    embedder = load_embedder(str(copy))

    short = TEXTS[:4]
    np.testing.assert_allclose(
        embedder.embed_queries(short), in_torch(copy.parent / "weights", short, "cat "), atol=1e-5
    )
    np.testing.assert_allclose(
        embedder.embed_documents(short), in_torch(copy.parent / "weights", short, "red "), atol=1e-5
    )


def test_the_first_token_is_taken_where_the_folder_says_so(copy):
    mean = load_embedder(str(copy))
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    first = load_embedder(str(copy))
    make_bert(copy.parent / "weights")

    assert mean.fingerprint != first.fingerprint
    expected = in_torch(copy.parent / "weights", TEXTS, "", first=True)
    np.testing.assert_allclose(first.embed_documents(TEXTS), expected, atol=1e-5)
    (copy / "1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelError, match="asks for max_tokens"):
        load_embedder(str(copy))


def test_a_graph_that_gives_vectors_is_taken_as_it_is(tmp_path):
    folder = make_bert(tmp_path / "m")
    export(folder, "embeddings")

    np.testing.assert_allclose(
        OnnxEmbedder(folder).embed_documents(TEXTS), in_torch(folder, TEXTS, "", first=True), atol=1e-5
    )


def test_a_name_leads_to_the_graph_without_torch(copy, tmp_path):
    code = "import sys, qwen_rerank; qwen_rerank.load_embedder(sys.argv[1]); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

    embedder = load_embedder(str(copy))
    assert embedder.name == str(copy)
    with FaissStore.create(tmp_path / "store", embedder) as store:
        store.add(TEXTS)
        assert store.search(TEXTS[0], 1, mode="dense")[0].document.text == TEXTS[0]


def test_a_pickle_holds_the_settings_alone(copy):
    embedder = OnnxEmbedder(copy, name="mine", batch_size=3)
    again = pickle.loads(pickle.dumps(embedder))

    assert (again.fingerprint, again.name, again._batch_size) == (embedder.fingerprint, "mine", 3)


def test_what_cannot_be_used_is_named(copy, tmp_path):
    with pytest.raises(ModelNotFoundError, match="is no folder"):
        OnnxEmbedder(tmp_path / "nothing")
    (copy / "config_sentence_transformers.json").write_text('{"prompts": {"query": 7}}')
    with pytest.raises(ModelCorruptError, match="each prompt as a text"):
        OnnxEmbedder(copy)
    (copy / "onnx/model.onnx").unlink()
    with pytest.raises(ModelIncompleteError, match="has no ONNX graph"):
        OnnxEmbedder(copy)
