"""The scorer that a name leads to: a Qwen3-Reranker checkpoint, a cross-encoder, or a rerank server."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qwen_rerank.checks import check_count, check_query, shown_address
from qwen_rerank.errors import InvalidInputError, ModelError
from qwen_rerank.models.folder import PROMPT_FILE, has_weights, read_json, read_settings, read_text
from qwen_rerank.models.names import PINNED, SHIPPED, find_model
from qwen_rerank.protocols import Scorer

Kind = Literal["qwen", "cross-encoder", "server"]

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_TAKEN: dict[Kind, tuple[str, ...]] = {
    "qwen": (
        "device",
        "dtype",
        "max_length",
        "instruction",
        "template",
        "deterministic",
        "revision",
        "quantize",
        "threads",
    ),
    "cross-encoder": ("device", "dtype", "max_length", "revision", "threads"),
    "server": ("max_length", "instruction", "dialect", "api_key", "tokenizer", "model"),
}
_CALLED: dict[Kind, str] = {
    "qwen": "a Qwen3-Reranker checkpoint",
    "cross-encoder": "a cross-encoder",
    "server": "a rerank server",
}
# All that tells a kind; nothing of it is large.
_SETTINGS = ("config.json", "modules.json", "adapter_config.json", "chat_template.jinja", PROMPT_FILE)
_OFFICIAL = {"vocab_size": 151_669, "max_position_embeddings": 40_960}  # no other Qwen3 model has both
_SYSTEM_PROMPT = "Judge whether the Document meets the requirements"


def load_scorer(
    name: str,
    *,
    device: str = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    max_length: int | None = None,
    instruction: str | None = None,
    template: Literal["transformers", "vllm"] | None = None,
    deterministic: bool = False,
    revision: str | None = None,
    dialect: str = "auto",
    api_key: str | None = None,
    tokenizer: str | None = None,
    model: str | None = None,
    quantize: Literal["int8"] | None = None,
    threads: int | None = None,
    cache: str | os.PathLike[str] | int | None = None,
) -> Scorer:
    """Return the scorer of that name: `QwenScorer`, `CrossEncoderScorer` or `HttpScorer`.

    Which one is read from the model's `config.json`, before any weights are. Every argument has its class's default where
    it is not given; one that the class does not have is refused.

    Args:
        name: A Qwen3-Reranker checkpoint or a cross-encoder, as a hub name or folder; the http(s) address of a rerank
            server; "mini" for the small model that ships with this package, "pocket" for the tiny one.
        device: Of a local model: "auto", "cpu", "cuda" or "cuda:N".
        dtype: Of a local model's arithmetic.
        max_length: Tokens of one prompt; None is the default of the class, or of the model.
        instruction: What counts as relevant, for calls without one; not of a cross-encoder.
        template: Of a Qwen3-Reranker: "transformers" (model card, the default) or "vllm".
        deterministic: Of a Qwen3-Reranker: scores that depend on nothing else in a batch.
        revision: Commit, tag or branch of a model on the hub.
        dialect: What a server speaks; "auto" asks it.
        api_key: Of a server.
        tokenizer: Folder or hub name of a server's checkpoint, to send it exact prompts.
        model: Name to ask a server for.
        quantize: Of a Qwen3-Reranker: "int8" multiplies in 8 bits on a CPU.
        threads: Of a local model: threads of a forward pass on a CPU.
        cache: File in which scores are kept, or how many of them to keep in memory; see `CachedScorer`, which is what
            comes back then.

    Raises:
        InvalidInputError: If the name is empty, or an argument is wrong or not for what the name leads to.
        ModelError: If the model is missing, damaged, unsafe, or no reranker.
        MissingExtraError: If a package that the scorer needs is not installed.
    """
    kind = scorer_kind(name, revision=revision)
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "max_length": max_length,
        "instruction": instruction,
        "template": template,
        "deterministic": deterministic,
        "revision": revision,
        "dialect": dialect,
        "api_key": api_key,
        "tokenizer": tokenizer,
        "model": model,
        "quantize": quantize,
        "threads": threads,
    }
    given = _checked_options(kind, name, options)
    if cache is None:
        return _load(kind, name, given)
    from qwen_rerank.scorers.cached import CachedScorer, open_cache

    opened = open_cache(cache)  # before the model: a file that is none should not cost its loading
    return CachedScorer(_load(kind, name, given), cache=opened)


def _load(kind: Kind, name: str, given: dict[str, Any]) -> Scorer:
    if kind == "server":
        from qwen_rerank.scorers.http import HttpScorer

        return HttpScorer(name, **given)
    if kind == "cross-encoder":
        from qwen_rerank.scorers.cross_encoder import CrossEncoderScorer

        return CrossEncoderScorer(name, **given)
    from qwen_rerank.scorers.qwen import QwenScorer

    return QwenScorer(name, **given)


def scorer_kind(name: str, *, revision: str | None = None) -> Kind:
    """Return what a name leads to, without opening any weights.

    Raises:
        InvalidInputError: If the name is empty, or a revision is given for what is not on the hub.
        ModelError: If it is a model that cannot score, or none.
    """
    if _ADDRESS.match(check_query(name, name="name", give="a hub name, a folder, an address, 'mini' or 'pocket'")):
        return "server"
    if name in PINNED:
        return "qwen"
    folder = find_model(name, revision=revision, files=(*_SETTINGS, "*_LogitScore/config.json")).path
    if name in SHIPPED and has_weights(folder):
        return "qwen"
    modules = _modules(folder)
    vectors = [module for module in modules if module not in ("Transformer", "LogitScore")]
    if vectors:
        raise ModelError(
            f"{name} is an embedding model ({vectors[0]}), which gives vectors and no scores; give it to load_embedder, "
            "and a reranker here."
        )
    settings = read_settings(folder)
    architectures = settings.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "model of no kind"
    if settings.get("model_type") == "qwen3" and architecture == "Qwen3ForSequenceClassification":
        return "qwen"  # a conversion, whose scores mean nothing without the prompt
    if architecture.endswith("ForSequenceClassification"):
        return "cross-encoder"
    if architecture != "Qwen3ForCausalLM":
        raise ModelError(
            f"{name} is a {architecture} and no reranker; give a Qwen3-Reranker checkpoint, a sequence classifier with "
            "one label, or the address of a rerank server."
        )
    if "LogitScore" in modules or _answers_yes_or_no(folder, settings):
        return "qwen"
    raise ModelError(
        f"{name} is a language model, and nothing says that it answers yes or no as a Qwen3-Reranker does; give a "
        f"reranker, or if it was trained to be one put a {PROMPT_FILE} with {{}} in it beside its config.json."
    )


def _checked_options(kind: Kind, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, if all of them are for such a scorer."""
    given = {option: value for option, value in options.items() if value not in (None, "auto") and value is not False}
    if misplaced := sorted(given.keys() - set(_TAKEN[kind])):
        raise InvalidInputError(
            f"{misplaced[0]} is not for {_CALLED[kind]}, which {shown_address(name) if kind == 'server' else name} is; leave it out."
        )
    if "threads" in given:
        check_count("threads", given["threads"])
    return given


def check_model(name: str, *, revision: str | None = None, **options: Any) -> Kind:
    """Return what a name leads to, its model opened as far as that goes without loading it; a server is not asked.

    Args:
        name: As for `load_scorer`.
        revision: Commit, tag or branch of a model on the hub.
        options: Of `load_scorer`, which must be for such a model.

    Raises:
        InvalidInputError: As `scorer_kind`, or if an option is wrong or not for what the name leads to.
        ModelError: If the model cannot be used.
    """
    kind = scorer_kind(name, revision=revision)
    _checked_options(kind, name, options)
    if kind == "qwen":
        from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint

        load_checkpoint(name, revision=revision)
    elif kind == "cross-encoder":
        from qwen_rerank.scorers.cross_encoder.classifier import open_classifier

        open_classifier(name, revision=revision)
    return kind


def _modules(folder: Path) -> list[str]:
    """Return the last part of the class of each module that sentence-transformers would load."""
    path = folder / "modules.json"
    modules = read_json(path, list) if path.exists() else []
    return [str(module.get("type") if isinstance(module, dict) else module).rpartition(".")[2] for module in modules]


def _answers_yes_or_no(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a causal model's folder says that it was trained as a reranker."""
    template = folder / "chat_template.jinja"
    return (
        (folder / PROMPT_FILE).exists()
        or all(settings.get(name) == value for name, value in _OFFICIAL.items())
        or (template.exists() and _SYSTEM_PROMPT in read_text(template))
    )
