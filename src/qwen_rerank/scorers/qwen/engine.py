"""Puts a checkpoint on a device: weights, attention, forward pass and pack size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.packing import Branch, Pack, Tree
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.attention_cuda import CudaAttention, choose_kernel
from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.device import (
    as_our_error,
    cap_process,
    choose_device,
    choose_dtype,
    cpu_budget,
    cuda_budget,
    on_device,
)
from qwen_rerank.scorers.qwen.forward import Forward
from qwen_rerank.scorers.qwen.layout import lay_out
from qwen_rerank.scorers.qwen.ops import EagerOps, Ops
from qwen_rerank.scorers.qwen.runner import Runner
from qwen_rerank.scorers.qwen.settings import QwenConfig
from qwen_rerank.scorers.qwen.weights import Weights, fuse

if TYPE_CHECKING:
    from qwen_rerank.scorers.qwen.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_CPU_ROW_CHUNK = 512  # keeps the MLP and the projections of a chunk in the caches
_CUDA_ROW_CHUNK = 16_384  # bounds the memory of the MLP and the projections
_OPENING_TOKENS = 512  # of instructions' openings that are kept: several of the usual length


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
    if device.type == "cuda" and config.gpu_memory_gb is not None:
        cap_process(device, config.gpu_memory_gb)
    try:
        with on_device(device):
            weights = fuse(
                checkpoint.weights,
                checkpoint.head,
                shape,
                dtype=dtype,
                device=device,
                max_length=config.max_length,
            )
            forward = _on_cuda(weights, shape) if device.type == "cuda" else _on_cpu(weights, shape)
            budget = config.token_budget or _budget(forward, shape, dtype, device, config)
    except Exception as exc:
        ours = as_our_error(exc)
        if ours is exc:
            raise
        raise ours from exc
    # Not measured on CUDA, where kept rows cost one more copy of a pack's keys.
    opening_tokens = _OPENING_TOKENS if device.type == "cpu" else 0
    run = Runner(forward, deterministic=config.deterministic, opening_tokens=opening_tokens)
    return Engine(run, device, dtype, budget)


def _on_cpu(weights: Weights, shape: QwenModelConfig) -> Forward:
    return Forward(weights, shape, CpuAttention(weights.norm.dtype), EagerOps(), row_chunk=_CPU_ROW_CHUNK)


def _on_cuda(weights: Weights, shape: QwenModelConfig) -> Forward:
    dtype, device = weights.norm.dtype, weights.norm.device
    kernel = choose_kernel(
        n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads, head_dim=shape.head_dim, dtype=dtype, device=device
    )
    ops = _cuda_ops(shape.head_dim, dtype, device)
    return Forward(weights, shape, CudaAttention(kernel, device), ops, row_chunk=_CUDA_ROW_CHUNK)


def _cuda_ops(head_dim: int, dtype: torch.dtype, device: torch.device) -> Ops:
    """Return fused kernels where Triton is there and right, else PyTorch's own operations."""
    try:
        from qwen_rerank.scorers.qwen.ops_triton import TritonOps, check_triton

        ops = TritonOps()
        check_triton(ops, head_dim=head_dim, dtype=dtype, device=device)
        return ops
    except Exception as exc:  # a missing compiler or driver library shows itself in many ways
        logger.warning("Triton kernels cannot be used on %s (%s); PyTorch's own operations are slower.", device, exc)
        return EagerOps()


def _budget(
    forward: Forward, shape: QwenModelConfig, dtype: torch.dtype, device: torch.device, config: QwenConfig
) -> int:
    """Return the tokens of a pack: by a warm-up on CUDA, by arithmetic on the CPU."""
    if device.type == "cpu":
        return cpu_budget(shape, dtype, max_length=config.max_length)

    def run(tokens: int) -> None:
        length = min(256, config.max_length)
        document = np.zeros(length, dtype=np.int32)
        forward(
            lay_out(
                Pack((Branch(Tree(document[:0], (document,) * (tokens // length)), tuple(range(tokens // length))),))
            ),
            None,
        )

    return cuda_budget(run, device, cap_gb=config.gpu_memory_gb)
