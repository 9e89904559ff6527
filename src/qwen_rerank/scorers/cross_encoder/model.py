"""A folder or hub name → a sequence classifier with one label, loaded from safetensors without any of its code."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as progress

from qwen_rerank.errors import (
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    ModelNotFoundError,
    TokenizerError,
    UnsafeModelError,
)

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
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
        fingerprint: Hash of configuration, tokenizer and weights.
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
    path = _resolve(model, revision)
    _check_files(path)
    settings = _read_json(path / "config.json")
    _check_settings(path, settings)
    network = _load_network(path, settings, dtype)
    tokenizer = _load_tokenizer(path)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    return LoadedModel(
        network=network,
        tokenizer_json=tokenizer_json,
        inputs=frozenset(tokenizer.model_input_names),
        pad_id=tokenizer.pad_token_id or 0,
        max_length=_longest(path, settings, tokenizer.model_max_length),
        fingerprint=_fingerprint(path, tokenizer_json),
    )


def _resolve(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except (OSError, HFValidationError) as exc:
        raise ModelNotFoundError(
            f"{model} is no folder and cannot be had from the model hub ({type(exc).__name__}); check the name and "
            "revision, or download the model elsewhere and pass its folder."
        ) from exc


def _check_files(path: Path) -> None:
    """Refuse a folder without safetensors weights, or with modules that are more than a classifier."""
    if not (path / "config.json").is_file():
        raise ModelIncompleteError(f"{path} has no config.json; pass the folder of a cross-encoder.")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} holds an adapter and no whole model; merge it into its base model first.")
    if not list(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise UnsafeModelError(
                f"{path} has weights only as {pickles[0]}, and loading that file could run code; convert it to safetensors."
            )
        raise ModelIncompleteError(f"{path} has no *.safetensors file; download the model again.")
    if (path / "modules.json").is_file():
        modules = _read_json(path / "modules.json", kind=list)
        types = [str(module.get("type")) if isinstance(module, dict) else str(module) for module in modules]
        others = [name for name in types if not name.endswith(".Transformer")]
        if others:
            raise ModelError(
                f"{path} is a cross-encoder of several modules ({others[0]}); only a sequence classifier can be loaded "
                "here. A Qwen3-Reranker goes into QwenScorer."
            )
    if (path / "config_sentence_transformers.json").is_file():
        prompt = _read_json(path / "config_sentence_transformers.json").get("default_prompt_name")
        if prompt is not None:
            raise ModelError(f"{path} puts its prompt {prompt!r} before every text, which CrossEncoderScorer cannot.")


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    architecture = str((settings.get("architectures") or ["none"])[0])
    if not architecture.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{path} is a {architecture} and no sequence classifier, so it has no score; "
            "pass a cross-encoder, or use QwenScorer for a Qwen3-Reranker."
        )
    # The name of an attention implementation on the hub would download code and run it.
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(settings.get(name)):
            raise UnsafeModelError(f"{path}/config.json names {name} {settings[name]!r}, which is code from elsewhere.")


def _load_network(path: Path, settings: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if config.num_labels != 1:
            raise ModelError(
                f"{path} has {config.num_labels} labels; a reranker has one, whose value is the log-odds of relevance."
            )
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
    except ModelError:
        raise
    except Exception as exc:  # transformers raises whatever a malformed file leads to
        if "auto_map" in settings:
            raise UnsafeModelError(
                f"{path} needs code of its own (auto_map in config.json), which is never run ({_first_line(exc)})."
            ) from exc
        raise ModelCorruptError(f"{path} cannot be loaded ({_first_line(exc)}); download the model again.") from exc
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
        raise TokenizerError(f"{path}: the tokenizer cannot be loaded ({_first_line(exc)}).") from exc
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
        limits.append(_read_json(saved).get("max_seq_length") or tokenizer_limit)
    shortest = min(limits)
    return shortest if shortest < 1_000_000 else None  # a tokenizer without a limit says 10**30


def _fingerprint(path: Path, tokenizer_json: str) -> str:
    digest = hashlib.blake2b(tokenizer_json.encode(), digest_size=16)
    for file in (path / "config.json", *sorted(path.glob("*.safetensors"))):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelCorruptError(f"{path} cannot be read ({_first_line(exc)}); download the model again.") from exc
    if not isinstance(data, kind):
        raise ModelCorruptError(
            f"{path} holds no JSON {'object' if kind is dict else 'list'}; download the model again."
        )
    return data


def _first_line(exc: Exception) -> str:
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0] if text else 'no details'}"
