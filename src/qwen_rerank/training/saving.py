"""The trained reranker as a plain checkpoint that other software loads without this package."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qwen_rerank.models.folder import PROMPT_FILE
from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PromptSpec
from qwen_rerank.scorers.qwen.checkpoint import Checkpoint
from qwen_rerank.training.recipe import RecipeModel

_CARRIED = ("tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def save_checkpoint(module: RecipeModel, base: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Save weights (LoRA merged), config, tokenizer and a chat template; return the folder.

    Args:
        module: The trained model; LoRA layers are merged into it.
        base: What it was trained from; tokenizer files are copied from it.
        folder: Is made if need be.
        dtype: Of the saved weights; None means that of the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = module.backbone
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    stored = next(iter(base.weights.values())).dtype if dtype is None else dtype
    model.to(stored).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(base.tokenizer_json, encoding="utf-8")
    for name in _CARRIED:
        if (base.path / name).is_file() and (base.path / name).resolve() != (folder / name).resolve():
            shutil.copyfile(base.path / name, folder / name)
    write_prompt_files(folder, module.encoder.spec, module.encoder.instruction)
    return folder


def write_prompt_files(folder: Path, spec: PromptSpec, instruction: str) -> None:
    """Write the prompt: `chat_template.jinja` for other software, `qwen_rerank.json` for ours where it is not the card's."""
    (folder / "chat_template.jinja").write_text(chat_template(spec, instruction), encoding="utf-8")
    own = {name: text for name, text in asdict(spec).items() if text != getattr(PromptSpec(), name)}
    if instruction != DEFAULT_INSTRUCTION:
        own["instruction"] = instruction
    if own:
        (folder / PROMPT_FILE).write_text(json.dumps(own, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    else:
        (folder / PROMPT_FILE).unlink(missing_ok=True)


def chat_template(spec: PromptSpec, instruction: str) -> str:
    """Return the prompt as a template over the roles `system` (the instruction), `query` and `document`.

    It is written for software that builds prompts with templates; this package never reads one.
    """
    parts = (
        spec.prefix,
        spec.instruction_label,
        _role("system", instruction),
        spec.separator + spec.query_label,
        _role("query", ""),
        spec.separator + spec.document_label,
        _role("document", ""),
        spec.suffix,
    )
    # Strings stand inside expressions: Jinja would strip the last newline of bare text.
    return "".join(
        part if part.startswith("{{") else "{{ " + json.dumps(part, ensure_ascii=False) + " }}" for part in parts
    )


def _role(role: str, default: str) -> str:
    quoted = json.dumps(default, ensure_ascii=False)
    return (
        '{{ messages | selectattr("role", "eq", "'
        + role
        + '") | map(attribute="content") | first | default('
        + quoted
        + ", true) }}"
    )
