"""The model card's recipe of Qwen3-Reranker, one pair at a time: slow, obvious, and what every fast path must equal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

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
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = json.loads((Path(model_dir) / "config.json").read_text())
    if config["architectures"] == ["Qwen3ForSequenceClassification"]:
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    yes, no = tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no")
    scores = []
    for query, document in pairs:
        ids = reference_ids(
            tokenizer, query, document, template=template, instruction=instruction, max_length=max_length
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        if logits.shape == (1,):
            scores.append(float(logits[0]))
        else:
            scores.append(float(logits[-1, yes] - logits[-1, no]))
    return np.array(scores, dtype=np.float64)
