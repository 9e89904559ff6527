"""Small checkpoints, each written once."""

import os
from pathlib import Path

import pytest

from qwen_rerank import QwenScorer
from tests.checkpoints import make_checkpoint, small_checkpoint


@pytest.fixture(scope="session")
def tokenizer_dir(request):
    """The official tokenizer; a machine without the shared folder names its own place for it."""
    named = os.environ.get("QWEN_RERANK_TOKENIZER")
    return Path(named).resolve() if named else request.getfixturevalue("shared") / "tokenizer"


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory, tokenizer_dir):
    """Return the folder of a small random checkpoint of a kind."""
    made = {}

    def get(kind="tied", **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = make_checkpoint(
                tmp_path_factory.mktemp(kind), kind=kind, tokenizer_dir=tokenizer_dir, **options
            )
        return made[key]

    return get


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a checkpoint of the same layers that knows bytes alone, and so is open in no time."""
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 96}
    return small_checkpoint(tmp_path_factory.mktemp("small") / "model", **sizes)


@pytest.fixture(scope="module")
def scorer(checkpoint_of):
    with QwenScorer(str(checkpoint_of()), device="cpu", max_length=512) as made:
        yield made
