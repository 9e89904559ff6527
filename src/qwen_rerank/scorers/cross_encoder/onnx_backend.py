"""A cross-encoder on ONNX Runtime: a checked graph, its tokenizer and its settings, read without torch or transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rerank.errors import InvalidInputError, ModelError, TokenizerError
from qwen_rerank.models.folder import read_json, read_tokenizer
from qwen_rerank.models.onnx_graph import read_graph
from qwen_rerank.models.onnx_session import OnnxSession, graph_digest
from qwen_rerank.scorers.cross_encoder.classifier import LoadedModel, find_graph, longest, read_classifier


class OnnxNetwork:
    """A classifier's graph on the CPU.

    Attributes:
        device: "cpu".
        inputs: Which of `input_ids`, `token_type_ids`, `attention_mask` it takes.
    """

    device = "cpu"

    def __init__(self, session: OnnxSession, path: Path) -> None:
        self.inputs = session.inputs
        self._session = session
        self._path = path

    def scores(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return log-odds, float32 `(n_pairs,)`.

        Raises:
            DeviceOutOfMemoryError: If the batch needs more memory than a run may take.
            ModelError: If the graph gives another number of values.
        """
        found = self._session.run(inputs)  # (n_pairs, 1), or (n_pairs,)
        n_pairs = len(inputs["input_ids"])
        if found.shape not in ((n_pairs,), (n_pairs, 1)):
            raise ModelError(
                f"{self._path} gives an array of shape {found.shape} for {n_pairs} pairs; a reranker gives one number each."
            )
        return found.reshape(n_pairs)


def load_onnx(path: Path, *, graph: str | None, device: str, dtype: str, threads: int | None) -> LoadedModel:
    """Load the cross-encoder in a folder.

    Raises:
        InvalidInputError: If a setting is for torch alone.
        ModelError: If the graph is missing, damaged, unsafe, or none with one label; one subclass for each reason.
    """
    if device not in ("auto", "cpu"):
        raise InvalidInputError(
            f"device ({device!r}) must be 'auto' or 'cpu' with backend='onnx', which runs on the CPU."
        )
    if dtype != "float32":
        raise InvalidInputError(
            f"dtype ({dtype!r}) is the graph's own with backend='onnx'; name another graph instead."
        )
    settings = read_classifier(path)
    checked = read_graph(find_graph(path, graph))
    session = OnnxSession(checked, output=None, rank=(1, 2), threads=threads)
    tokenizer_json = read_tokenizer(path / "tokenizer.json")
    tokenizer = _tokenizer_settings(path)
    parts = (graph_digest(checked), tokenizer_json, json.dumps(settings, sort_keys=True))
    return LoadedModel(
        network=OnnxNetwork(session, checked.path),
        tokenizer_json=tokenizer_json,
        pad_id=_pad_id(path, tokenizer_json, tokenizer, settings),
        max_length=longest(path, settings, _limit(tokenizer)),
        fingerprint=hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32],
    )


def _tokenizer_settings(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    settings: dict[str, Any] = read_json(file) if file.exists() else {}
    return settings


def _limit(tokenizer: Mapping[str, Any]) -> float:
    limit = tokenizer.get("model_max_length")
    return limit if isinstance(limit, int | float) and limit >= 1 else float("inf")


def _pad_id(path: Path, tokenizer_json: str, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """Return the id that fills shorter rows: of the tokenizer's padding token, else what the model's settings say."""
    token = tokenizer.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    try:
        data = json.loads(tokenizer_json)
        known = {added["content"]: added["id"] for added in data.get("added_tokens") or []}
        padding = (data.get("padding") or {}).get("pad_id")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise TokenizerError(f"{path / 'tokenizer.json'} is not of a kind that can be read ({exc!r}).") from exc
    for found in (known.get(token), padding, settings.get("pad_token_id")):
        if isinstance(found, int) and found >= 0:
            return found
    return 0
