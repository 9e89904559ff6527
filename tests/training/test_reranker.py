"""A few steps of training: the loss falls, and the checkpoint scores the same wherever it is loaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen_rerank import QwenScorer
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.training import RerankerTraining, train_reranker
from tests.reference import reference_log_odds

QUICK = RerankerTraining(
    epochs=4, batch_size=4, mini_batch_size=8, learning_rate=5e-3, max_length=512, precision="float32"
)
DOCUMENTS = ["yes 1", "no 1"]


def stock_scores(folder) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu")
    return model.predict([("q1", text) for text in DOCUMENTS], activation_fn=torch.nn.Identity())


@pytest.mark.parametrize("objective", ["pointwise", "listwise", "distillation"])
def test_the_loss_falls_and_the_order_is_learned(base, labelled, taught, tmp_path, objective):
    examples = taught if objective == "distillation" else labelled

    report = train_reranker(str(base), examples, tmp_path, training=replace(QUICK, objective=objective))

    assert report.losses[-1][1] < report.losses[0][1]
    yes, no = QwenScorer(str(tmp_path), device="cpu", dtype="float32").score("q1", DOCUMENTS)
    assert yes > no


def test_a_lora_training_is_merged_and_loads_everywhere(base, labelled, tmp_path):
    training = replace(QUICK, lora_rank=4, learning_rate=2e-2)

    report = train_reranker(str(base), labelled, tmp_path, training=training)

    assert report.losses[-1][1] < report.losses[0][1]
    engine = QwenScorer(str(tmp_path), device="cpu", dtype="float32").score("q1", DOCUMENTS)
    reference = reference_log_odds(tmp_path, [("q1", text) for text in DOCUMENTS])
    np.testing.assert_allclose(engine, reference, atol=1e-4)
    np.testing.assert_allclose(stock_scores(tmp_path), reference, atol=1e-4)


def test_a_resumed_training_ends_where_an_unbroken_one_does(base, labelled, tmp_path):
    """Half the steps, then the rest from the saved state, give the weights of one run."""
    whole = replace(QUICK, epochs=2, eval_steps=4)
    train_reranker(str(base), labelled, tmp_path / "whole", training=whole)
    broken = tmp_path / "broken"
    train_reranker(str(base), labelled, broken, training=whole)
    last = max((broken / "states").iterdir(), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()

    train_reranker(str(base), labelled, broken, training=whole, resume=True)

    scores = [QwenScorer(str(tmp_path / name), device="cpu").score("q1", DOCUMENTS) for name in ("whole", "broken")]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_held_out_examples_are_measured(base, labelled, tmp_path):
    report = train_reranker(str(base), labelled, tmp_path, training=QUICK, held_out=labelled[:4])

    assert report.evaluations
    assert all(0.0 <= value <= 1.0 for _, value in report.evaluations)


def test_an_instruction_of_its_own_goes_with_the_checkpoint(base, labelled, tmp_path):
    training = replace(QUICK, epochs=1, instruction="Find the text that agrees")

    train_reranker(str(base), labelled, tmp_path, training=training)

    own = QwenScorer(str(tmp_path), device="cpu", dtype="float32").score("q1", DOCUMENTS)
    np.testing.assert_allclose(own, stock_scores(tmp_path), atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "message"),
    [("distillation", "needs teacher scores"), ("listwise", "only positives")],
)
def test_examples_that_cannot_teach_are_refused(base, labelled, tmp_path, objective, message):
    examples = labelled if objective == "distillation" else [replace(labelled[0], scores=(1.0, 1.0))]

    with pytest.raises(InvalidInputError, match=message):
        train_reranker(str(base), examples, tmp_path, training=replace(QUICK, objective=objective))


def test_nothing_to_resume_is_said(base, labelled, tmp_path):
    with pytest.raises(InvalidInputError, match="no saved state"):
        train_reranker(str(base), labelled, tmp_path, training=QUICK, resume=True)
