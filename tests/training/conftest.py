"""A checkpoint of a few kilobytes to train, and examples it can learn in a few steps."""

from __future__ import annotations

import pytest

from qwen_rerank.training import Example
from tests.checkpoints import small_checkpoint


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def labelled():
    """Sixteen queries whose relevant document is the one that says yes."""
    return [Example(f"q{i}", (f"yes {i}", f"no {i}"), (1.0, 0.0)) for i in range(16)]


@pytest.fixture(scope="session")
def taught(labelled):
    """The same with a teacher's log-odds."""
    return [Example(e.query, e.documents, (2.0, -2.0), teacher=True) for e in labelled]
