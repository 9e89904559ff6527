"""Writes small Qwen3 checkpoints with random weights and the official tokenizer, for tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from qwen_rerank.tokenizer import PromptTokenizer

VOCABULARY = 151_669
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def official_tokenizers(tokenizer_dir: Path) -> tuple[PromptTokenizer, Tokenizer]:
    """Return the official tokenizer as the package reads it, and as it is; read once for all tests."""
    text = (tokenizer_dir / "tokenizer.json").read_text()
    return PromptTokenizer(text), Tokenizer.from_str(text)


def small_tokenizer(folder: Path) -> int:
    """Write a `tokenizer.json` of Qwen's family whose only words are "yes" and "no"; return the size of its vocabulary.

    Letters and bytes are tokens of their own, so a text has as many tokens as UTF-8 bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("y", "e"), ("ye", "s"), ("n", "o")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def small_checkpoint(folder: Path, *, kind: Literal["tied", "untied", "seq-cls"] = "tied", **options: Any) -> Path:
    """Write a checkpoint of a few kilobytes with `small_tokenizer`, marked as a reranker by an empty `qwen_rerank.json`."""
    tokenizer_dir = folder.parent / "small-tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen_rerank.json").write_text("{}")
    return make_checkpoint(
        folder,
        kind=kind,
        tokenizer_dir=tokenizer_dir,
        vocabulary=small_tokenizer(tokenizer_dir),
        **{"hidden": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate": 24, **options},
    )


def make_checkpoint(
    folder: Path,
    *,
    kind: Literal["tied", "untied", "seq-cls"] = "tied",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tokenizer_dir: Path,
    vocabulary: int = VOCABULARY,
) -> Path:
    """Write a checkpoint into `folder` and return it; log-odds come out within about -10 to 10."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForSequenceClassification" if kind == "seq-cls" else "Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40_960,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": kind == "tied",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }
    if kind == "seq-cls":
        config |= {
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": min(151_643, vocabulary - 1),
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
        if (tokenizer_dir / name).exists():
            (folder / name).symlink_to((tokenizer_dir / name).resolve())
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(config, seed=seed).items()}
    write_weights(folder, weights, shards=shards)
    return folder


def random_weights(config: dict[str, Any], *, seed: int) -> dict[str, torch.Tensor]:
    """Return float32 weights under their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float | None = None) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (columns**-0.5 if scale is None else scale)

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    hidden, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 0.3),
        "model.norm.weight": norm(hidden),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        weights[at + "input_layernorm.weight"] = norm(hidden)
        weights[at + "post_attention_layernorm.weight"] = norm(hidden)
        weights[at + "self_attn.q_proj.weight"] = matrix(query, hidden)
        weights[at + "self_attn.k_proj.weight"] = matrix(key, hidden)
        weights[at + "self_attn.v_proj.weight"] = matrix(key, hidden)
        weights[at + "self_attn.o_proj.weight"] = matrix(hidden, query)
        weights[at + "self_attn.q_norm.weight"] = norm(dim)
        weights[at + "self_attn.k_norm.weight"] = norm(dim)
        weights[at + "mlp.gate_proj.weight"] = matrix(mlp, hidden)
        weights[at + "mlp.up_proj.weight"] = matrix(mlp, hidden)
        weights[at + "mlp.down_proj.weight"] = matrix(hidden, mlp)
    if config["architectures"][0] == "Qwen3ForSequenceClassification":
        weights["score.weight"] = matrix(1, hidden, 0.4)
    elif not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 0.3)
    return weights


def write_weights(folder: Path, weights: dict[str, torch.Tensor], *, shards: int = 1) -> None:
    """Write one safetensors file, or several with their index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        part = {name: weights[name] for name in names if places[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
