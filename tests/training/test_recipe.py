"""The batched forward pass of training equals whole prompts, one at a time."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.training.recipe import RecipeModel, common_length
from tests.reference import reference_log_odds

PAIRS = [("red", "a red cat"), ("red", ""), ("blue sky", "something much longer than the others, 北京")]


def test_a_shared_start_does_not_change_scores(base):
    backbone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    encoder = PromptEncoder((base / "tokenizer.json").read_text())
    for share in (True, False):
        module = RecipeModel(backbone, encoder, share_prefix=share)
        with torch.no_grad():
            scores = module(module.preprocess(PAIRS))["scores"][:, 0].numpy()
        np.testing.assert_allclose(scores, reference_log_odds(base, PAIRS), atol=1e-4)


def test_gradients_reach_every_layer_through_the_shared_start(base):
    backbone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    module = RecipeModel(backbone, PromptEncoder((base / "tokenizer.json").read_text()))

    module(module.preprocess(PAIRS))["scores"].sum().backward()

    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in backbone.model.layers.parameters())


def test_the_common_start_leaves_every_prompt_a_token():
    assert common_length([np.array([1, 2, 3]), np.array([1, 2, 3])]) == 2
    assert common_length([np.array([1, 2, 3]), np.array([1, 5, 3])]) == 1
