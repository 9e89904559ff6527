"""The parts that both backends of `CrossEncoderScorer` share: which backend, which folder, and what a classifier must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from qwen_rerank.errors import ModelError
from qwen_rerank.extras import is_importable
from qwen_rerank.models.folder import has_weights, read_json, read_settings, weight_files
from qwen_rerank.models.names import MODEL_FILES, find_model
from qwen_rerank.models.onnx_graph import find_graph, graph_files, graph_paths

Backend = Literal["auto", "torch", "onnx"]


class Network(Protocol):
    """A cross-encoder's network on one backend.

    Attributes:
        device: Where it runs.
        inputs: Which of `input_ids`, `token_type_ids`, `attention_mask` it takes.
        tokens_at_once: Tokens that a batch may have, unless it is one pair; None for any number.
    """

    device: str
    inputs: frozenset[str]
    tokens_at_once: int | None

    def scores(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return log-odds, float32 `(n_pairs,)`, of a batch that is padded on the right, int64 `(n_pairs, n_tokens)` each.

        Raises:
            DeviceOutOfMemoryError: If the batch does not fit.
        """
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A cross-encoder and what is needed to feed it.

    Attributes:
        network: The classifier.
        tokenizer: Its tokenizer, whose control tokens no text can reach.
        pad_id: Fills shorter prompts of a batch.
        max_length: Longest prompt it was made for, in tokens; None where the files do not say.
        fingerprint: 32 hex digits over configuration, tokenizer and weights.
    """

    network: Network
    tokenizer: Tokenizer
    pad_id: int
    max_length: int | None
    fingerprint: str


def open_classifier(
    model: str, *, revision: str | None, backend: Backend = "auto", graph: str | None = None
) -> tuple[Path, Literal["torch", "onnx"]]:
    """Return the folder of a sequence classifier with one label, and the backend that runs it.

    "auto" takes torch where it is installed and the folder holds safetensors, else a graph where there is one.

    Raises:
        ModelError: If it is something else, or cannot be loaded without pickle or code.
    """
    wanted = backend
    if backend == "auto":
        wanted = "torch" if graph is None and is_importable("torch", "transformers") else "onnx"
    path = find_model(model, revision=revision, files=MODEL_FILES if wanted == "torch" else graph_files(graph)).path
    read_classifier(path)
    if backend == "auto":
        if wanted == "torch" and not has_weights(path):  # the hub may have a graph, which was not asked for yet
            path = find_model(model, revision=revision, files=graph_files(None)).path
            wanted = "onnx" if graph_paths(path) else "torch"
        elif wanted == "onnx" and graph is None and not graph_paths(path):
            return path, "torch"  # which says what must be installed
    if wanted == "torch":
        weight_files(path)
        return path, "torch"
    find_graph(path, graph)
    return path, "onnx"


def read_classifier(path: Path) -> dict[str, Any]:
    """Return `config.json` of a sequence classifier with one label that needs no prompt around its texts.

    Raises:
        ModelError: If it is something else, or needs code of its own.
    """
    settings = read_settings(path)
    architectures = settings.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "none"
    if not architecture.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{path} is a {architecture} and no sequence classifier, so it has no score; "
            "pass a cross-encoder, or use QwenScorer for a Qwen3-Reranker."
        )
    if settings.get("model_type") == "qwen3":
        raise ModelError(
            f"{path} is a Qwen3-Reranker as a sequence classifier, whose scores mean nothing without its prompt; use "
            "QwenScorer, which builds the prompt."
        )
    labels = settings.get("id2label")
    n_labels = len(labels) if isinstance(labels, dict) else settings.get("num_labels", 2)  # 2 is transformers' default
    if n_labels != 1:
        raise ModelError(f"{path} has {n_labels} labels; a reranker has one, whose value is the log-odds of relevance.")
    if (path / "modules.json").is_file():
        modules = read_json(path / "modules.json", list)
        types = [str(module.get("type")) if isinstance(module, dict) else str(module) for module in modules]
        others = [name for name in types if not name.endswith(".Transformer")]
        if others:
            raise ModelError(
                f"{path} is a cross-encoder of several modules ({others[0]}); only a sequence classifier can be loaded "
                "here. A Qwen3-Reranker goes into QwenScorer."
            )
    if (path / "config_sentence_transformers.json").is_file():
        prompt = read_json(path / "config_sentence_transformers.json").get("default_prompt_name")
        if prompt is not None:
            raise ModelError(f"{path} puts its prompt {prompt!r} before every text, which CrossEncoderScorer cannot.")
    return settings
