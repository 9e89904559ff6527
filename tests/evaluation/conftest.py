"""A small collection with a first stage that errs and a scorer that knows."""

from __future__ import annotations

import pytest

from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.types import Candidate, Document

WORDS = ["red", "green", "blue", "black", "white", "pink", "grey", "brown"]


class FixedFirstStage:
    """Gives the documents in the corpus' order, whatever is asked."""

    def __init__(self, documents):
        self.documents = documents
        self.asked = []

    def search(self, query, top_k, *, filter=None):
        self.asked.append(query)
        return [Candidate(d, 1.0 / rank, rank) for rank, d in enumerate(self.documents[:top_k], start=1)]


@pytest.fixture
def collection():
    documents = [Document(f"d{i}", f"{word} paint") for i, word in enumerate(WORDS)]
    queries = {f"q{i}": f"{word} colour" for i, word in enumerate(WORDS)}
    return Collection("paint", "test", documents, queries, {f"q{i}": {f"d{i}": 1} for i in range(len(WORDS))})


@pytest.fixture
def first_stage(collection):
    return FixedFirstStage(collection.documents)
