"""Puts a checkpoint on a device: weights, attention, forward pass and pack size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.device import choose_device, choose_dtype, cpu_budget
from qwen_rerank.scorers.qwen.forward import Forward
from qwen_rerank.scorers.qwen.runner import Runner
from qwen_rerank.scorers.qwen.settings import QwenConfig
from qwen_rerank.scorers.qwen.weights import fuse

if TYPE_CHECKING:
    from qwen_rerank.scorers.qwen.checkpoint import Checkpoint

_CPU_ROW_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Engine:
    """A model that is ready to run packs."""

    run: Runner
    device: torch.device
    dtype: torch.dtype
    token_budget: int


def build_engine(checkpoint: Checkpoint, config: QwenConfig) -> Engine:
    """Return the engine for a checkpoint; takes the weights out of it.

    Raises:
        InvalidInputError: If the device is not there, or max_length is above what the model knows.
    """
    shape = checkpoint.config
    if config.max_length > shape.max_positions:
        raise InvalidInputError(
            f"max_length ({config.max_length}) must be at most the {shape.max_positions} positions of {checkpoint.name}."
        )
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, checkpoint.weights["model.norm.weight"].dtype)
    weights = fuse(
        checkpoint.weights,
        checkpoint.head,
        checkpoint.head_bias,
        shape,
        dtype=dtype,
        device=device,
        max_length=config.max_length,
    )
    forward = Forward(weights, shape, CpuAttention(dtype), row_chunk=_CPU_ROW_CHUNK)
    budget = config.token_budget or cpu_budget(shape, dtype, max_length=config.max_length)
    return Engine(Runner(forward, deterministic=config.deterministic), device, dtype, budget)
