"""The model card's recipe of Qwen3-Reranker, one pair at a time: slow, obvious, and what every fast path must equal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3ForSequenceClassification,
)

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def reference_body(query: str, document: str, *, template: str = "transformers", instruction: str | None = None) -> str:
    """Return the text between prefix and suffix."""
    gap = {"transformers": "\n", "vllm": "\n\n"}[template]
    return f"<Instruct>: {instruction or INSTRUCTION}{gap}<Query>: {query}{gap}<Document>: {document}"


def reference_ids(
    tokenizer: Any,
    query: str,
    document: str,
    *,
    template: str = "transformers",
    instruction: str | None = None,
    max_length: int = 8192,
) -> list[int]:
    """Return the ids of one prompt: the body is tokenized as one string and cut at its end."""
    prefix = tokenizer.encode(PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
    body = tokenizer(
        reference_body(query, document, template=template, instruction=instruction),
        add_special_tokens=False,
        padding=False,
        truncation="longest_first",
        return_attention_mask=False,
        max_length=max_length - len(prefix) - len(suffix),
    )["input_ids"]
    return prefix + body + suffix


def reference_log_odds(
    model_dir: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    template: str = "transformers",
    instruction: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int = 8192,
) -> np.ndarray:
    """Return the log-odds of each (query, document) pair, float64 `(n_pairs,)`, computed in `dtype` on the CPU."""
    tokenizer, model = _tokenizer(model_dir), _model(model_dir, dtype)
    classifier = isinstance(model, Qwen3ForSequenceClassification)
    options = {} if classifier else {"logits_to_keep": 1}  # of the last token, not of 150,000 words for each
    yes, no = tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no")
    scores = []
    for query, document in pairs:
        ids = reference_ids(
            tokenizer, query, document, template=template, instruction=instruction, max_length=max_length
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), **options).logits[0]
        if classifier:
            scores.append(float(logits[0]))
        else:
            scores.append(float(logits[-1, yes] - logits[-1, no]))
    return np.array(scores, dtype=np.float64)


@lru_cache(maxsize=1)
def _tokenizer(model_dir: str | Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@lru_cache(maxsize=2)
def _model(model_dir: str | Path, dtype: torch.dtype) -> Any:
    config = json.loads((Path(model_dir) / "config.json").read_text())
    kind = (
        AutoModelForSequenceClassification
        if config["architectures"] == ["Qwen3ForSequenceClassification"]
        else AutoModelForCausalLM
    )
    return kind.from_pretrained(model_dir, dtype=dtype).eval()
