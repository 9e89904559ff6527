"""`qwen-rerank doctor` and `help`: what is wrong, and the line that cures it."""

from __future__ import annotations

import pytest

from qwen_rerank.cli import doctor
from qwen_rerank.help import sections


def test_both_faiss_wheels_at_once_are_a_problem_with_its_cure():
    (finding,) = doctor._faiss("1.15.1", "1.15.1")

    assert finding.level == "problem"
    assert "pip uninstall -y faiss-cpu faiss-gpu" in finding.cure


def test_a_missing_faiss_is_a_note_with_its_extra():
    (finding,) = doctor._faiss(None, None)

    assert (finding.level, finding.cure) == ("note", "pip install 'qwen-rerank[faiss-cpu]'")


@pytest.mark.parametrize(
    ("gib", "bytes_per_weight", "largest"),
    [
        pytest.param(1, 2, "none", id="too small for all"),
        pytest.param(4, 2, "0.6B", id="small GPU"),
        pytest.param(16, 2, "4B", id="T4"),
        pytest.param(24, 2, "8B", id="A10G"),
        pytest.param(24, 4, "4B", id="laptop in float32"),
    ],
)
def test_the_largest_model_that_fits_is_named(gib, bytes_per_weight, largest):
    assert largest in doctor._fitting("here", gib * 1024**3, bytes_per_weight=bytes_per_weight).seen


def test_every_finding_has_something_to_read():
    findings = doctor.examine()

    assert all(finding.subject and finding.seen for finding in findings)
    assert {"Python", "torch", "faiss", "model hub"} <= {finding.subject for finding in findings}


def test_both_languages_have_the_same_topics():
    english, chinese = sections("en"), sections("zh")

    assert list(english) == list(chinese)
    assert {"model", "hub", "long-text", "slow", "memory", "scores", "port", "faiss"} == set(english)
