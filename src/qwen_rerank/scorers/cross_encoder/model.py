"""A folder or hub name → a sequence classifier with one label, loaded from safetensors without any of its code."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as progress

from qwen_rerank.errors import ModelCorruptError, ModelError, ModelIncompleteError, TokenizerError
from qwen_rerank.models.folder import folder_digest, read_json, read_settings, weight_files
from qwen_rerank.models.names import find_model, first_line

_OFFSET_FAMILIES = ("roberta", "camembert", "mpnet")  # their positions begin after the padding id


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A cross-encoder and what is needed to feed it.

    Attributes:
        network: The classifier, in evaluation mode.
        tokenizer_json: Its tokenizer.
        inputs: Which of `input_ids`, `token_type_ids`, `attention_mask` it takes.
        pad_id: Fills shorter prompts of a batch.
        max_length: Longest prompt it was made for, in tokens; None where the files do not say.
        fingerprint: 32 hex digits over configuration, tokenizer and weights.
    """

    network: torch.nn.Module
    tokenizer_json: str
    inputs: frozenset[str]
    pad_id: int
    max_length: int | None
    fingerprint: str


def load_model(model: str, *, revision: str | None, dtype: torch.dtype) -> LoadedModel:
    """Load a cross-encoder by hub name or folder.

    Raises:
        ModelNotFoundError: If there is no such folder or hub name, or the hub cannot be reached.
        ModelIncompleteError: If a file or a weight is missing; a head is never made up.
        ModelCorruptError: If a file cannot be read.
        UnsafeModelError: If the weights are pickled or the model needs code of its own.
        ModelError: If it is no classifier with one label.
    """
    path, settings = open_classifier(model, revision=revision)
    network = _load_network(path, dtype)
    tokenizer = _load_tokenizer(path)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    return LoadedModel(
        network=network,
        tokenizer_json=tokenizer_json,
        inputs=frozenset(tokenizer.model_input_names),
        pad_id=tokenizer.pad_token_id or 0,
        max_length=_longest(path, settings, tokenizer.model_max_length),
        fingerprint=hashlib.sha256((folder_digest(path) + tokenizer_json).encode()).hexdigest()[:32],
    )


def open_classifier(model: str, *, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Return folder and `config.json` of a sequence classifier with one label that needs no prompt around its texts.

    Raises:
        ModelError: If it is something else, or cannot be loaded without pickle or code.
    """
    path = find_model(model, revision=revision).path
    settings = read_settings(path)
    _check_classifier(path, settings)
    weight_files(path)
    return path, settings


def _check_classifier(path: Path, settings: Mapping[str, Any]) -> None:
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


def _longest(path: Path, settings: dict[str, Any], tokenizer_limit: int) -> int | None:
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
    return shortest if shortest < 1_000_000 else None  # a tokenizer without a limit says 10**30
