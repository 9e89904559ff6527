"""A cross-encoder on ONNX Runtime: a checked graph, its tokenizer and its settings, read without torch or transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from qwen_rerank.errors import InvalidInputError, ModelError
from qwen_rerank.models.folder import longest_input, read_tokenizer
from qwen_rerank.models.onnx_graph import find_graph, read_graph
from qwen_rerank.models.onnx_session import OnnxSession
from qwen_rerank.models.safe_tokenizer import safe_tokenizer
from qwen_rerank.scorers.cross_encoder.classifier import LoadedModel, read_classifier


class OnnxNetwork:
    """A classifier's graph on the CPU.

    Attributes:
        device: "cpu".
        inputs: Which of `input_ids`, `token_type_ids`, `attention_mask` it takes.
        tokens_at_once: As the session's.
    """

    device = "cpu"

    def __init__(self, session: OnnxSession, path: Path) -> None:
        self.tokens_at_once: int | None = session.tokens_at_once
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


def load_onnx(
    path: Path, *, graph: str | None, device: str, dtype: str, threads: int | None, is_ours: bool
) -> LoadedModel:
    """Load the cross-encoder in a folder; `is_ours` says that it ships with this package.

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
    with ThreadPoolExecutor(1) as beside:  # the runtime opens a graph for as long as the tokenizer takes
        opening = beside.submit(OnnxSession, checked, output=None, rank=(1, 2), threads=threads, fold=is_ours)
        tokenizer_json = read_tokenizer(path / "tokenizer.json", is_ours=is_ours)
        tokenizer = safe_tokenizer(tokenizer_json, is_ours=is_ours)
    session = opening.result()
    parts = (session.digest, tokenizer_json, json.dumps(settings, sort_keys=True))
    return LoadedModel(
        network=OnnxNetwork(session, checked.path),
        tokenizer=tokenizer,
        pad_id=pad if isinstance(pad := settings.get("pad_token_id"), int) and pad >= 0 else 0,
        max_length=longest_input(path, settings),
        fingerprint=hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32],
    )
