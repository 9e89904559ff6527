"""What both backends of `CrossEncoderScorer` share: which backend, which folder, and what a classifier must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from qwen_rerank.errors import ModelError, ModelIncompleteError
from qwen_rerank.models.folder import has_weights, read_json, read_settings, weight_files
from qwen_rerank.models.names import MODEL_FILES, find_model

Backend = Literal["auto", "torch", "onnx"]

# Where exporters put a graph, in the order in which one is taken: first those with the weights as they were trained.
GRAPHS = ("onnx/model.onnx", "model.onnx", "onnx/model_quantized.onnx", "model_quantized.onnx")
_MORE_GRAPHS = ("onnx/model_*.onnx", "model_*.onnx")
_OFFSET_FAMILIES = ("roberta", "camembert", "mpnet")  # their positions begin after the padding id


class Network(Protocol):
    """A cross-encoder's network on one backend.

    Attributes:
        device: Where it runs.
        inputs: Which of `input_ids`, `token_type_ids`, `attention_mask` it takes.
    """

    device: str
    inputs: frozenset[str]

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
        tokenizer_json: Its tokenizer.
        pad_id: Fills shorter prompts of a batch.
        max_length: Longest prompt it was made for, in tokens; None where the files do not say.
        fingerprint: 32 hex digits over configuration, tokenizer and weights.
    """

    network: Network
    tokenizer_json: str
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
        wanted = "torch" if graph is None and _has_torch() else "onnx"
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


def graph_files(graph: str | None) -> tuple[str, ...]:
    """Return the patterns of a model's files on the hub with one graph and the weights beside it."""
    graphs = GRAPHS[:2] if graph is None else (graph,)
    return ("*.json", "*.txt", *(pattern for name in graphs for pattern in (name, f"{name}*data")))


def graph_paths(folder: Path) -> list[Path]:
    """Return the graphs of a folder, in the order in which one is taken."""
    usual = [folder / name for name in GRAPHS]
    more = [path for pattern in _MORE_GRAPHS for path in sorted(folder.glob(pattern)) if path not in usual]
    return [path for path in (*usual, *more) if path.exists()]


def find_graph(folder: Path, graph: str | None) -> Path:
    """Return the graph of a folder: the named one, or the first of those that exporters write.

    Raises:
        ModelIncompleteError: If there is none.
        ModelError: If the name leads out of the folder.
    """
    if graph is None:
        found = graph_paths(folder)
        if not found:
            raise ModelIncompleteError(
                f"{folder} has no ONNX graph ({', '.join(GRAPHS)}); export the model to ONNX, or use backend='torch'."
            )
        return found[0]
    path = folder / graph
    if Path(graph).is_absolute() or ".." in Path(graph).parts:
        raise ModelError(f"graph must be a file in the model's folder, such as 'onnx/model.onnx', not {graph!r}.")
    if not path.exists():
        others = ", ".join(str(each.relative_to(folder)) for each in graph_paths(folder))
        raise ModelIncompleteError(f"{path} is missing; the folder has {others or 'no graph'}.")
    return path


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


def longest(path: Path, settings: Mapping[str, Any], tokenizer_limit: float) -> int | None:
    """Return the shortest of the limits that the model's files set."""
    limits = [tokenizer_limit]
    positions = settings.get("max_position_embeddings")
    if isinstance(positions, int):
        is_offset = any(family in str(settings.get("model_type")) for family in _OFFSET_FAMILIES)
        limits.append(positions - int(settings.get("pad_token_id") or 0) - 1 if is_offset else positions)
    saved = path / "sentence_bert_config.json"
    if saved.is_file():
        limits.append(read_json(saved).get("max_seq_length") or tokenizer_limit)
    shortest = min(limits)
    return int(shortest) if shortest < 1_000_000 else None  # a tokenizer without a limit says 10**30


def _has_torch() -> bool:
    """Return whether torch and transformers are installed, without importing them."""
    try:
        return all(find_spec(name) is not None for name in ("torch", "transformers"))
    except ImportError:
        return False
