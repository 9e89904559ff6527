"""A cross-encoder in torch: the network that transformers builds from safetensors, without any of the model's code."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rerank.errors import (
    DeviceOutOfMemoryError,
    InvalidInputError,
    MissingExtraError,
    ModelCorruptError,
    ModelIncompleteError,
    TokenizerError,
)
from qwen_rerank.models.folder import folder_digest, longest_input, weight_files
from qwen_rerank.models.names import first_line
from qwen_rerank.models.safe_tokenizer import safe_tokenizer
from qwen_rerank.scorers.cross_encoder.classifier import LoadedModel, read_classifier
from qwen_rerank.sharing import check_gpu_after_fork

try:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging as progress
except ImportError as exc:
    raise MissingExtraError(
        "CrossEncoderScorer with safetensors weights", package="transformers", extra="transformers", cause=exc
    ) from exc

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchNetwork:
    """A classifier of transformers on one device.

    Attributes:
        device: Where it runs.
        inputs: Which of `input_ids`, `token_type_ids`, `attention_mask` it takes.
        tokens_at_once: None, for any number.
    """

    tokens_at_once: int | None = None

    def __init__(
        self, module: torch.nn.Module, device: torch.device, inputs: frozenset[str], threads: int | None
    ) -> None:
        self.device = str(device)
        self.inputs = inputs
        self._module = module.to(device)
        self._threads = threads

    def scores(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return log-odds, float32 `(n_pairs,)`.

        Raises:
            DeviceOutOfMemoryError: If the batch does not fit.
        """
        tensors = {name: torch.from_numpy(rows).to(self.device) for name, rows in inputs.items()}
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                logits = self._module(**tensors).logits[:, 0]  # (n_pairs, 1) → (n_pairs,)
                return logits.float().cpu().numpy()  # type: ignore[no-any-return]
        except torch.cuda.OutOfMemoryError as exc:
            torch.cuda.empty_cache()
            raise DeviceOutOfMemoryError(f"a batch of {tensors['input_ids'].shape} tokens does not fit.") from exc


def load_torch(path: Path, *, device: str, dtype: str, threads: int | None) -> LoadedModel:
    """Load the cross-encoder in a folder.

    Raises:
        InvalidInputError: If there is no such device.
        ModelIncompleteError: If a file or a weight is missing; a head is never made up.
        ModelCorruptError: If a file cannot be read.
        UnsafeModelError: If the weights are pickled.
    """
    where = _device(device)
    weight_files(path)
    settings = read_classifier(path)
    module = _load_network(path, _DTYPES[dtype])
    tokenizer = _load_tokenizer(path)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    return LoadedModel(
        network=TorchNetwork(module, where, frozenset(tokenizer.model_input_names), threads),
        tokenizer=safe_tokenizer(tokenizer_json),
        pad_id=tokenizer.pad_token_id or 0,
        max_length=longest_input(path, settings, tokenizer.model_max_length),
        fingerprint=hashlib.sha256((folder_digest(path) + tokenizer_json).encode()).hexdigest()[:32],
    )


def _device(name: str) -> torch.device:
    if name != "cpu":
        check_gpu_after_fork()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # fails where there is no such device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        return device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as exc:
        raise InvalidInputError(
            f"device must be 'auto' or a torch device of this machine such as 'cpu' or 'cuda:0', not {name!r}."
        ) from exc


def _load_network(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with _without_progress_bar():
            network, report = AutoModelForSequenceClassification.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as exc:  # transformers raises whatever a malformed file leads to
        raise ModelCorruptError(f"{path} cannot be loaded ({first_line(exc)}); download the model again.") from exc
    absent = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if absent:
        raise ModelIncompleteError(
            f"{path} lacks {len(absent)} weights, {absent[0]} for one; random ones in their place would score at random."
        )
    network.eval()
    return network  # type: ignore[no-any-return]


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep the bar over the weights out of logs and pipes; on a terminal it is shown."""
    silence = not sys.stderr.isatty() and progress.is_progress_bar_enabled()
    if silence:
        progress.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            progress.enable_progress_bar()


def _load_tokenizer(path: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as exc:  # as above
        raise TokenizerError(f"{path}: the tokenizer cannot be loaded ({first_line(exc)}).") from exc
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TokenizerError(f"{path}: {type(tokenizer).__name__} has no tokenizer.json; save the tokenizer with one.")
    return tokenizer
