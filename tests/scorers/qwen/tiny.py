"""A small random Qwen3, scored prompt by prompt and in packs; needs no hypothesis."""

import numpy as np
import torch
from packs import plan_packs
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_rerank.packing import Opening, Tree
from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.runner import Runner
from qwen_rerank.scorers.qwen.weights import Weights, fuse

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
def one_by_one(model, trees: list[Tree], *, device: str = "cpu") -> np.ndarray:
    """Return log-odds of every prompt, run alone through Transformers."""
    prompts = [torch.from_numpy(np.concatenate((tree.prefix, d))).long() for tree in trees for d in tree.documents]
    logits = [model(ids[None].to(device), logits_to_keep=1).logits[0, -1] for ids in prompts]
    return np.array([float(row[YES] - row[NO]) for row in logits])


def packed(runner: Runner, trees: list[Tree], *, token_budget: int) -> np.ndarray:
    found = {}
    for pack in plan_packs(trees, token_budget=token_budget):
        scores = iter(runner(pack))
        found |= {(id(branch.tree), i): next(scores) for branch in pack.branches for i in branch.indices}
    return np.array([found[id(tree), i] for tree in trees for i in range(len(tree.documents))])


def trees_of(shapes: list[tuple[int, list[int]]], *, seed: int = 0, openings: tuple[int, ...] = ()) -> list[Tree]:
    """Return random trees; those with a prefix begin with one of the openings, which have these lengths, in turn."""
    draw = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return draw.integers(0, VOCABULARY, n).astype(np.int32)

    known, trees = [Opening(ids(length)) for length in openings], []
    for i, (prefix, lengths) in enumerate(shapes):
        opening = known[i % len(known)] if known and prefix else None
        start = [opening.ids] if opening else []
        trees.append(Tree(np.concatenate((*start, ids(prefix))), tuple(ids(length) for length in lengths), opening))
    return trees


def tiny_weights(stored: dict[str, torch.Tensor], *, dtype: torch.dtype, device: str) -> Weights:
    """Take the weights out of a state dict, fused."""
    head = stored["lm_head.weight"][YES].float() - stored["lm_head.weight"][NO].float()
    place = {"dtype": dtype, "device": torch.device(device), "max_length": MAX_LENGTH}
    return fuse(stored, head, tiny_config(), **place)
