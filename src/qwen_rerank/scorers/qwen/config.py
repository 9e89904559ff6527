"""A checkpoint's config.json and qwen_rerank.json, checked before a single weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_rerank.checks import check_text
from qwen_rerank.errors import InvalidInputError, ModelCorruptError, ModelError
from qwen_rerank.models.folder import read_json, read_settings
from qwen_rerank.prompt import PromptSpec

_PROMPT_KEYS = (
    "prefix",
    "suffix",
    "separator",
    "instruction_label",
    "query_label",
    "document_label",
    "yes",
    "no",
    "instruction",
)
_KINDS: dict[str, Literal["causal", "seq-cls"]] = {
    "Qwen3ForCausalLM": "causal",
    "Qwen3ForSequenceClassification": "seq-cls",
}
_LIMITS = {
    "hidden_size": 65_536,
    "num_hidden_layers": 1_024,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 1_024,
    "intermediate_size": 1_048_576,
    "vocab_size": 4_194_304,
    "max_position_embeddings": 16_777_216,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenModelConfig:
    """The shape of a Qwen3 model.

    Attributes:
        kind: `"causal"` with rows for "yes" and "no", or `"seq-cls"` with one row.
        tied: Whether the output head is the embedding.
    """

    kind: Literal["causal", "seq-cls"]
    tied: bool
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    max_positions: int


def read_config(folder: Path) -> QwenModelConfig:
    """Return the checked content of a folder's `config.json`.

    Raises:
        ModelError: If the model is no Qwen3 reranker, or uses something that would change the scores unseen.
    """
    data, path = read_settings(folder), folder / "config.json"
    kind = _check_supported(data, path)
    sizes = {name: _size(data, name, limit, path) for name, limit in _LIMITS.items()}
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        raise ModelCorruptError(
            f"{path}: num_attention_heads ({sizes['num_attention_heads']}) must be a multiple of num_key_value_heads "
            f"({sizes['num_key_value_heads']}), and head_dim ({sizes['head_dim']}) must be even."
        )
    return QwenModelConfig(
        kind=kind,
        tied=_flag(data, "tie_word_embeddings", path),
        hidden_size=sizes["hidden_size"],
        n_layers=sizes["num_hidden_layers"],
        n_heads=sizes["num_attention_heads"],
        n_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        intermediate_size=sizes["intermediate_size"],
        rms_norm_eps=_number("rms_norm_eps", data.get("rms_norm_eps"), path, below=1.0),
        rope_theta=_rope_theta(data, path),
        vocab_size=sizes["vocab_size"],
        max_positions=sizes["max_position_embeddings"],
    )


def read_prompt_file(path: Path) -> dict[str, str]:
    """Return the strings of a `qwen_rerank.json`, which a fine-tuned checkpoint carries when its prompt is its own.

    The keys, all optional: prefix, suffix, separator, instruction_label, query_label, document_label, yes, no (as in
    `PromptSpec`) and instruction (the default one). A folder without the file gives `{}`.

    Raises:
        ModelCorruptError: If a key is unknown or a value cannot be used.
    """
    if not path.exists():
        return {}
    data = read_json(path)
    unknown = sorted(set(data) - set(_PROMPT_KEYS))
    if unknown:
        raise ModelCorruptError(f"{path}: unknown key {unknown[0]!r}; the keys are {', '.join(_PROMPT_KEYS)}.")
    try:
        texts = {name: check_text(name, value) for name, value in data.items()}
        PromptSpec(**{name: text for name, text in texts.items() if name != "instruction"})
    except InvalidInputError as exc:
        raise ModelCorruptError(f"{path}: {exc}") from exc
    return texts


def _check_supported(data: Mapping[str, Any], path: Path) -> Literal["causal", "seq-cls"]:
    """Refuse whatever the forward pass does not compute; ignoring it would give other scores without a word."""
    if data.get("model_type") != "qwen3":
        raise ModelError(f"{path}: model_type is {data.get('model_type')!r}; only 'qwen3' checkpoints can be scored.")
    architectures = data.get("architectures")
    kind = next((kind for name, kind in _KINDS.items() if architectures == [name]), None)
    if kind is None:
        raise ModelError(f"{path}: architectures is {architectures!r}; a reranker is one of {', '.join(_KINDS)}.")
    labels = data.get("id2label")
    n_labels = len(labels) if isinstance(labels, dict) else data.get("num_labels", 1)
    if kind == "seq-cls" and n_labels != 1:
        raise ModelError(f"{path}: the head has {n_labels} labels; a reranker has exactly one.")
    if data.get("quantization_config"):
        raise ModelError(f"{path}: quantized weights (quantization_config) cannot be read; use the bf16 checkpoint.")
    if _flag(data, "attention_bias", path) or data.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: attention_bias must be false and hidden_act 'silu', as in Qwen3.")
    layer_types = data.get("layer_types") or []
    everything = isinstance(layer_types, list) and all(name == "full_attention" for name in layer_types)
    if _flag(data, "use_sliding_window", path) or not everything:
        raise ModelError(f"{path}: sliding-window attention is not supported; every layer must attend to everything.")
    return kind


def _rope_theta(data: Mapping[str, Any], path: Path) -> float:
    """Return the rotary base, from where transformers 4 or 5 wrote it; any scaling of positions is refused."""
    parameters: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        section = data.get(name) or {}
        if not isinstance(section, dict):
            raise ModelCorruptError(f"{path}: {name} must be an object, not {section!r}.")
        parameters |= section
    rope_type = parameters.pop("rope_type", parameters.pop("type", "default"))
    theta = parameters.pop("rope_theta", data.get("rope_theta"))
    if rope_type != "default" or parameters:
        raise ModelError(f"{path}: rotary scaling ({rope_type!r}, {sorted(parameters)}) is not supported; remove it.")
    return _number("rope_theta", theta, path, below=1e12)


def _size(data: Mapping[str, Any], name: str, limit: int, path: Path) -> int:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ModelCorruptError(f"{path}: {name} must be an integer from 1 to {limit:,}, not {value!r}.")
    return value


def _number(name: str, value: object, path: Path, *, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
        raise ModelCorruptError(f"{path}: {name} must be a number above 0 and below {below:g}, not {value!r}.")
    return float(value)


def _flag(data: Mapping[str, Any], name: str, path: Path) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise ModelCorruptError(f"{path}: {name} must be true or false, not {value!r}.")
    return value
