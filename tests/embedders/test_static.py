"""The static embedder: numpy alone, zero rows for texts without tokens, typed errors for broken folders."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from qwen_rerank.embedders.static import StaticEmbedder
from qwen_rerank.errors import ModelCorruptError, ModelIncompleteError, ModelNotFoundError


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0, "red": 1, "cat": 2}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vectors = np.array([[0, 0], [3, 0], [0, 4]], dtype=np.float16)
    save_file({"embedding.weight": vectors}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_text_is_the_normalised_sum_of_its_tokens(folder):
    embedder = StaticEmbedder(folder)

    np.testing.assert_allclose(embedder.embed_documents(["red cat", "cat"]), [[0.6, 0.8], [0, 1]], atol=1e-6)
    assert embedder.embed_queries(["red"]).dtype == np.float32


def test_a_text_without_known_tokens_gives_a_zero_row(folder):
    assert not StaticEmbedder(folder).embed_documents(["", "  ", "unknown"]).any()


def test_the_fingerprint_changes_with_the_weights(folder):
    before = StaticEmbedder(folder).fingerprint
    save_file({"embedding.weight": np.ones((3, 2), dtype=np.float16)}, folder / "model.safetensors")

    assert StaticEmbedder(folder).fingerprint != before


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("model.safetensors", None, ModelIncompleteError),
        ("tokenizer.json", None, ModelIncompleteError),
        ("model.safetensors", b"no", ModelCorruptError),
        ("tokenizer.json", b"{}", ModelCorruptError),
    ],
)
def test_a_broken_folder_is_named(folder, name, content, error):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)

    with pytest.raises(error, match=name):
        StaticEmbedder(folder)


def test_too_few_vectors_are_refused(folder):
    save_file({"embedding.weight": np.ones((2, 2), dtype=np.float16)}, folder / "model.safetensors")

    with pytest.raises(ModelCorruptError, match="2 vectors for the tokenizer's 3 tokens"):
        StaticEmbedder(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        StaticEmbedder(tmp_path / "nowhere")


def test_no_heavy_library_is_loaded():
    code = (
        "from qwen_rerank import load_embedder; import sys; load_embedder('pocket').embed_queries(['a']); "
        "print(sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
