"""A small random Qwen3, scored prompt by prompt and in batches; needs no hypothesis."""

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.engine import Runner
from qwen_rerank.scorers.qwen.model import Weights, exact_matrix, fuse
from qwen_rerank.scorers.qwen.packing import QueryGroup, SharedPrefix
from tests.batches import plan_batches

YES, NO, VOCABULARY, MAX_LENGTH = 7, 9, 500, 8192


def tiny_config() -> QwenModelConfig:
    return QwenModelConfig(
        kind="causal",
        tied=False,
        hidden_size=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        intermediate_size=96,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        vocab_size=VOCABULARY,
        max_positions=MAX_LENGTH,
    )


def tiny_model() -> Qwen3ForCausalLM:
    """A random model whose norms are not all one, with log-odds of about -4 to 5, whose float32 errors stay below 1e-5."""
    shape = tiny_config()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=VOCABULARY,
            rope_theta=shape.rope_theta,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.15,
            tie_word_embeddings=False,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


@torch.inference_mode()
def one_by_one(model, groups: list[QueryGroup], *, device: str = "cpu") -> np.ndarray:
    """Return log-odds of every prompt, run alone through Transformers."""
    prompts = [torch.from_numpy(np.concatenate((group.prefix, d))).long() for group in groups for d in group.documents]
    logits = [model(ids[None].to(device), logits_to_keep=1).logits[0, -1] for ids in prompts]
    return np.array([float(row[YES] - row[NO]) for row in logits])


def packed(runner: Runner, groups: list[QueryGroup], *, token_budget: int) -> np.ndarray:
    found = {}
    for batch in plan_batches(groups, token_budget=token_budget):
        scores = iter(runner(batch))
        found |= {(id(group_slice.group), i): next(scores) for group_slice in batch.slices for i in group_slice.indices}
    return np.array([found[id(group), i] for group in groups for i in range(len(group.documents))])


def groups_of(
    shapes: list[tuple[int, list[int]]], *, seed: int = 0, shared_prefixes: tuple[int, ...] = ()
) -> list[QueryGroup]:
    """Return random groups; those with a prefix begin with one of the shared prefixes, which have these lengths, in cos_sin."""
    draw = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return draw.integers(0, VOCABULARY, n).astype(np.int32)

    known, groups = [SharedPrefix(ids(length)) for length in shared_prefixes], []
    for i, (prefix, lengths) in enumerate(shapes):
        shared_prefix = known[i % len(known)] if known and prefix else None
        start = [shared_prefix.ids] if shared_prefix else []
        groups.append(
            QueryGroup(np.concatenate((*start, ids(prefix))), tuple(ids(length) for length in lengths), shared_prefix)
        )
    return groups


def tiny_weights(stored: dict[str, torch.Tensor], *, dtype: torch.dtype, device: str) -> Weights:
    """Take the weights out of a state dict, fused."""
    head = stored["lm_head.weight"][YES].float() - stored["lm_head.weight"][NO].float()
    place = {"dtype": dtype, "device": torch.device(device), "max_length": MAX_LENGTH}
    return fuse(stored, head, tiny_config(), **place, make_matrix=exact_matrix)
