from __future__ import annotations

from pathlib import Path

import pytest

from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

FRUIT = [
    Document("apple", "a red apple grows on a tree", {"kind": "fruit", "year": 2020, "fresh": True}),
    Document("pear", "a green pear grows on a tree", {"kind": "fruit", "year": 2021, "fresh": False}),
    Document("carrot", "an orange carrot grows in the ground", {"kind": "root", "year": 2020, "fresh": None}),
    Document("苹果", "红色的苹果长在树上", {"kind": "水果", "tags": ["a", "b"]}),
]


@pytest.fixture
def embedder() -> HashEmbedder:
    return HashEmbedder(32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path, embedder: HashEmbedder):
    with FaissStore.create(path, embedder) as made:
        made.add(FRUIT)
        yield made
