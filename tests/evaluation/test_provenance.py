"""A collection inside the training data is flagged by its name."""

from __future__ import annotations

import pytest

from qwen_rerank.evaluation.provenance import POCKET, in_domain


@pytest.mark.parametrize(
    ("name", "training_set"),
    [
        ("dureader_demo", "DuReader (DuRetrieval)"),
        ("MSMARCO-passage", "MS MARCO"),
        ("beir/nq", "Natural Questions"),
        ("T2Reranking", "T2Ranking"),
        ("scifact", None),
        ("unquoted", None),
        ("online", None),
    ],
)
def test_names_of_the_published_training_data(name, training_set):
    assert in_domain(name) == training_set


def test_the_small_models_have_a_list_of_their_own():
    assert in_domain("scifact", training=POCKET) == "SciFact"
    assert in_domain("xquad_r_zh", training=POCKET) is None
