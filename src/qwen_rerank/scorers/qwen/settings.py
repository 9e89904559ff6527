"""What a `QwenScorer` is made with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qwen_rerank.checks import check_choice, check_count, check_query, check_text
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.prompt import TEMPLATES

DEFAULT_MAX_LENGTH = 8192  # tokens of one prompt, as in the model card
Template = Literal["transformers", "vllm"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenConfig:
    """How the local engine runs; the arguments of `QwenScorer`, which says what each means."""

    model: str = "Qwen/Qwen3-Reranker-0.6B"
    device: str = "auto"
    dtype: Dtype = "auto"
    instruction: str | None = None  # the checkpoint's own, else the model card's
    template: Template = "transformers"
    max_length: int = DEFAULT_MAX_LENGTH  # tokens of one prompt, template included
    revision: str | None = None
    deterministic: bool = False
    token_budget: int | None = None  # tokens of one forward pass; None: measured
    gpu_memory_gb: float | None = None  # GiB that the process may take on the GPU; None: what is free

    def __post_init__(self) -> None:
        check_query(self.model, name="model")
        check_query(self.device, name="device")
        if self.instruction is not None:
            check_text("instruction", self.instruction)
        check_choice("template", self.template, list(TEMPLATES))
        check_choice("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        check_count("max_length", self.max_length)
        if self.token_budget is not None and check_count("token_budget", self.token_budget) < self.max_length:
            raise InvalidInputError(
                f"token_budget ({self.token_budget}) must hold at least one prompt of max_length "
                f"({self.max_length}) tokens; raise token_budget or lower max_length."
            )
        if self.gpu_memory_gb is not None and not (math.isfinite(self.gpu_memory_gb) and self.gpu_memory_gb > 0):
            raise InvalidInputError(f"gpu_memory_gb must be a positive number of GiB, not {self.gpu_memory_gb!r}.")
