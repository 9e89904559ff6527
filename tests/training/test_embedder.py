"""A trained static embedder loads in sentence-transformers and in numpy alone, with the same vectors."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_rerank.embedders.static import StaticEmbedder
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.training import EmbedderTraining, Example, RerankerTraining, train_embedder

PAIRS = [("红色", "the red cat"), ("蓝色", "a blue sky"), ("green", "grass and leaves"), ("winter", "snow and ice")]
EXAMPLES = [Example(query, (text,), (1.0,)) for query, text in PAIRS * 8]
QUICK = EmbedderTraining(epochs=4, batch_size=8, learning_rate=1e-2)


def test_training_pulls_pairs_together_and_both_libraries_agree(tmp_path):
    report = train_embedder("pocket", EXAMPLES, tmp_path, training=QUICK)

    assert report.losses[-1][1] < report.losses[0][1]
    embedder = StaticEmbedder(tmp_path)
    similar = embedder.embed_queries([q for q, _ in PAIRS]) @ embedder.embed_documents([d for _, d in PAIRS]).T
    assert (similar.argmax(axis=1) == np.arange(4)).all()

    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer(str(tmp_path), device="cpu").encode(["the red cat"]).astype(np.float32)
    np.testing.assert_allclose(stock, embedder.embed_documents(["the red cat"]), atol=2e-3)


def test_fewer_than_two_pairs_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="1 positive pair"):
        train_embedder("pocket", EXAMPLES[:1], tmp_path)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (EmbedderTraining, {"epochs": "3"}),
        (EmbedderTraining, {"temperature": float("inf")}),
        (EmbedderTraining, {"seed": -1}),
        (RerankerTraining, {"epochs": "1"}),
        (RerankerTraining, {"learning_rate": float("inf")}),
        (RerankerTraining, {"max_steps": 0}),
        (RerankerTraining, {"max_steps": "x"}),
        (RerankerTraining, {"weight_decay": -5}),
        (RerankerTraining, {"seed": -1}),
        (RerankerTraining, {"template": "nope"}),
        (RerankerTraining, {"gradient_checkpointing": "no"}),
    ],
)
def test_a_setting_that_no_training_can_have_is_refused_by_name(settings, wrong):
    with pytest.raises(InvalidInputError, match=f"{next(iter(wrong))} must be"):
        settings(**wrong)
