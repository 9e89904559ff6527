"""Embedders: texts to vectors, for the first stage."""

from __future__ import annotations

import os.path

from qwen_rerank.checks import check_text
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.extras import is_importable
from qwen_rerank.models.folder import has_weights
from qwen_rerank.models.names import SHIPPED, find_model
from qwen_rerank.models.onnx_graph import graph_paths
from qwen_rerank.protocols import Embedder

__all__ = ["load_embedder"]


def load_embedder(name: str, *, device: str = "auto", revision: str | None = None) -> Embedder:
    """Return the embedder of that name.

    Args:
        name: "mini" or "pocket", which ship with this package, else a sentence-transformers model name or folder. A
            folder with an ONNX graph needs nothing more where it holds no safetensors or sentence-transformers is missing.
        device: "auto", or a torch device such as "cpu" or "cuda:1"; what ships and what is in ONNX runs on the CPU.
        revision: Commit or tag of a model on the hub.

    Raises:
        InvalidInputError: If the name is empty.
        ModelError: If the model is missing, damaged, unsafe or no embedding model.
        MissingExtraError: If sentence-transformers is needed and not installed.
    """
    if not check_text("name", name):
        raise InvalidInputError("name is empty; give 'mini', 'pocket' or a sentence-transformers model.")
    if name in SHIPPED or os.path.isdir(os.path.expanduser(name)):
        folder = find_model(name, kind="embedder", revision=revision).path
        if graph_paths(folder, "embedder") and not (has_weights(folder) and is_importable("sentence_transformers")):
            from qwen_rerank.embedders.onnx import OnnxEmbedder

            return OnnxEmbedder(folder, name=name)
        if name in SHIPPED:
            from qwen_rerank.embedders.static import StaticEmbedder

            return StaticEmbedder(folder, name=name)
    from qwen_rerank.embedders.sentence_transformer import SentenceTransformerEmbedder

    return SentenceTransformerEmbedder(name, device=device, revision=revision)
