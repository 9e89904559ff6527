"""A Qwen3-Reranker checkpoint: found, checked, and opened without running anything it brings."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qwen_rerank.errors import (
    InvalidInputError,
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    ModelNotFoundError,
    TokenizerError,
)
from qwen_rerank.models.folder import INDEX, PROMPT_FILE, read_index, read_json, read_tokenizer, weight_files
from qwen_rerank.models.names import find_model
from qwen_rerank.prompt import PromptSpec
from qwen_rerank.regular_files import open_regular
from qwen_rerank.scorers.qwen.config import QwenModelConfig, read_config, read_prompt_file
from qwen_rerank.tokenizer import PromptTokenizer

_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_CLASS_HEAD = "score.weight"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SAMPLE_BYTES = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        name: As the user named it.
        revision: Commit on the hub, or None.
        path: Its folder.
        config: The model's shape.
        weights: Hugging Face name to tensor, on the CPU, in the stored dtype, memory-mapped; without the output head.
        head: float32 `(hidden_size,)`: the output row of "yes" minus that of "no", or the only row of a classifier.
        tokenizer: The tokenizer, for `PromptEncoder`.
        tokenizer_json: Content of `tokenizer.json`.
        prompt: Strings of `qwen_rerank.json`, `{}` for an official checkpoint.
        fingerprint: 16 hex digits over config, tokenizer, prompt, output head, and of every weight its name, dtype,
            shape, first and last 4 KiB. The same for a copy elsewhere or in other shards. Training touches every
            tensor and so is seen; a flipped bit within one is not: `weights_sha256` reads everything.
    """

    name: str
    revision: str | None
    path: Path
    config: QwenModelConfig
    weights: dict[str, torch.Tensor]
    head: torch.Tensor
    tokenizer: PromptTokenizer
    tokenizer_json: str
    prompt: dict[str, str]
    fingerprint: str

    @property
    def instruction(self) -> str | None:
        """The default instruction that the checkpoint was trained with, or None for the model card's."""
        return self.prompt.get("instruction")

    def prompt_spec(self, template: str) -> PromptSpec:
        """Return the strings of the prompt: the template's, replaced where the checkpoint brings its own."""
        return _spec(template, self.prompt)


def load_checkpoint(model: str, *, revision: str | None = None, sha256: str | None = None) -> Checkpoint:
    """Open a checkpoint by hub name, local folder, or `"pocket"`. Weights are mapped, not read.

    Args:
        model: For the three official names the revision is pinned.
        revision: Commit, tag or group_slice on the hub; only for a hub name.
        sha256: What `weights_sha256` must give; reads every byte. None trusts the files.

    Raises:
        InvalidInputError: If an argument is wrong.
        ModelNotFoundError: If there is no such folder or name.
        ModelIncompleteError: If a file or weight is missing, or unexpected.
        ModelCorruptError: If a file cannot be read as what it should be.
        UnsafeModelError: If it needs pickle or code of its own.
        TokenizerError: If the tokenizer does not have the prompt's control strings and labels as single tokens.
        ModelError: If it is no Qwen3 reranker.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InvalidInputError(f"sha256 must be 64 lower-case hex digits, not {sha256!r}.")
    source = find_model(model, revision=revision)
    folder = source.path
    if not any(folder.iterdir()):
        raise ModelNotFoundError(f"{folder} is no checkpoint: config.json, tokenizer.json and weights are missing.")
    config = read_config(folder)
    prompt = read_prompt_file(folder / PROMPT_FILE)
    tokenizer_json = read_tokenizer(folder / "tokenizer.json")
    tokenizer = PromptTokenizer(tokenizer_json, source=str(folder / "tokenizer.json"))
    labels = _check_tokens(tokenizer, _spec("transformers", prompt), config, folder)
    _check_logit_score(folder, labels)
    if sha256 is not None:
        _check_sha256(folder, sha256)
    stored = _read_weights(folder)
    head = _take_head(stored, config, labels, folder)
    _check_weights(stored, config, folder)
    return Checkpoint(
        name=source.name,
        revision=source.revision,
        path=folder,
        config=config,
        weights=stored,
        head=head,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer_json,
        prompt=prompt,
        fingerprint=_fingerprint(config, prompt, tokenizer.digest, head, stored),
    )


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 over the weights files of a folder, in name order; for a single file that of `sha256sum`."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open_regular(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _check_sha256(folder: Path, expected: str) -> None:
    found = weights_sha256(folder)
    if found != expected:
        raise ModelCorruptError(
            f"{folder}: the weights have SHA-256 {found}, not {expected}; download the checkpoint again."
        )


def expected_shapes(config: QwenModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight but the output head."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for i in range(config.n_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _spec(template: str, prompt: dict[str, str]) -> PromptSpec:
    own = {name: text for name, text in prompt.items() if name != "instruction"}
    return replace(PromptSpec.for_template(template), **own)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every stored tensor by name, on the CPU, in its stored dtype, memory-mapped."""
    tensors: dict[str, torch.Tensor] = {}
    paths, places = weight_files(folder), read_index(folder)
    for path in paths:
        found = _read_safetensors(path)
        if places and (odd := found.keys() ^ {name for name, shard in places.items() if shard == path.name}):
            raise ModelIncompleteError(
                f"{path} and {INDEX} disagree: {min(odd)} is {'only in the shard' if min(odd) in found else 'not in it'}."
            )
        tensors |= found
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as exc:
        raise ModelCorruptError(f"{path} cannot be read as safetensors ({exc}); download it again.") from exc
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelCorruptError(
                f"{path}: {name} is stored as {tensor.dtype}; float32, float16 or bfloat16 is needed."
            )
    return tensors


def _check_tokens(
    tokenizer: PromptTokenizer, spec: PromptSpec, config: QwenModelConfig, folder: Path
) -> tuple[int, int]:
    """Return the ids of the two labels, after checking every token that a prompt can hold."""
    if tokenizer.n_ids > config.vocab_size:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'} has ids up to {tokenizer.n_ids - 1}, but config.json gives the model "
            f"{config.vocab_size} embeddings; the two files belong to different models."
        )
    tokenizer.control_ids(spec.prefix)
    tokenizer.control_ids(spec.suffix)
    return tokenizer.single_id(spec.yes), tokenizer.single_id(spec.no)


def _check_logit_score(folder: Path, labels: tuple[int, int]) -> None:
    """Refuse a folder of sentence-transformers that was trained with other answers than the prompt's."""
    for path in folder.glob("*_LogitScore/config.json"):
        data = read_json(path)
        trained = (data.get("true_token_id"), data.get("false_token_id"))
        if trained != labels:
            raise ModelError(
                f"{path} scores the tokens {trained}, but the labels of the prompt are {labels}; name the labels (yes, "
                f"no) in {folder / PROMPT_FILE}."
            )


def _take_head(
    stored: dict[str, torch.Tensor], config: QwenModelConfig, labels: tuple[int, int], folder: Path
) -> torch.Tensor:
    """Take the output head out of `stored` and return the one row that matters, float32 `(hidden_size,)`."""
    if config.kind == "seq-cls":
        head = _take(stored, _CLASS_HEAD, (1, config.hidden_size), folder)[0].float()
    else:
        rows = _output_rows(stored, config, folder)
        yes, no = labels
        head = rows[yes].float() - rows[no].float()
    if not torch.isfinite(head).all() or not head.any():
        raise ModelCorruptError(
            f"{folder}: the output head is zero or not finite, so it cannot tell any two documents apart."
        )
    return head


def _output_rows(stored: dict[str, torch.Tensor], config: QwenModelConfig, folder: Path) -> torch.Tensor:
    shape = (config.vocab_size, config.hidden_size)
    if not config.tied:
        return _take(stored, _LM_HEAD, shape, folder)
    embedding = stored.get(_EMBEDDING)
    if embedding is None or tuple(embedding.shape) != shape:
        _check_weights(stored, config, folder)  # says which weight is missing or misshapen
    duplicate = stored.pop(_LM_HEAD, None)
    if duplicate is not None and not torch.equal(duplicate, stored[_EMBEDDING]):
        raise ModelIncompleteError(
            f"{folder}: config.json ties the output head to the embedding, but {_LM_HEAD} is stored and differs; set "
            "tie_word_embeddings to false if the stored head is the trained one."
        )
    return stored[_EMBEDDING]


def _take(stored: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], folder: Path) -> torch.Tensor:
    tensor = stored.pop(name, None)
    if tensor is None:
        raise ModelIncompleteError(f"{folder} lacks the weight {name}; nothing is ever filled in at random.")
    if tuple(tensor.shape) != shape:
        raise ModelIncompleteError(f"{folder}: {name} has shape {tuple(tensor.shape)}; config.json makes it {shape}.")
    return tensor


def _check_weights(stored: dict[str, torch.Tensor], config: QwenModelConfig, folder: Path) -> None:
    """Refuse missing, unexpected and wrongly shaped weights."""
    expected = expected_shapes(config)
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing:
        raise ModelIncompleteError(
            f"{folder} lacks {len(missing)} weights, first {missing[0]}; nothing is ever filled in at random."
        )
    if unexpected:
        raise ModelIncompleteError(
            f"{folder} has {len(unexpected)} unexpected weights, first {unexpected[0]}; it is another architecture."
        )
    for name, shape in expected.items():
        if tuple(stored[name].shape) != shape:
            raise ModelIncompleteError(
                f"{folder}: {name} has shape {tuple(stored[name].shape)}; config.json makes it {shape}."
            )


def _fingerprint(
    config: QwenModelConfig,
    prompt: dict[str, str],
    tokenizer: str,
    head: torch.Tensor,
    weights: dict[str, torch.Tensor],
) -> str:
    digest = hashlib.sha256(json.dumps([asdict(config), prompt, tokenizer], sort_keys=True).encode())
    digest.update(head.numpy().tobytes())
    for name in sorted(weights):
        tensor = weights[name]
        flat = tensor.reshape(-1)
        n = _SAMPLE_BYTES // tensor.element_size()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for sample in (flat[:n], flat[-n:]):
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
