"""Mined negatives are hard, and never a text that may be relevant."""

from __future__ import annotations

import pytest

from qwen_rerank import Candidate, Document
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.testing import HashEmbedder, TableScorer
from qwen_rerank.training import EmbeddedDocuments, Example, Mining, mine_negatives

EXAMPLE = Example("q", ("good",), (1.0,))


class Listed:
    """A first stage with fixed scores."""

    def __init__(self, scores):
        self.scores = scores

    def search(self, query, top_k, *, filter=None):
        pairs = sorted(self.scores.items(), key=lambda pair: -pair[1])[:top_k]
        return [Candidate(Document(text, text), score, rank) for rank, (text, score) in enumerate(pairs, start=1)]


def test_what_stands_near_the_positive_is_left_out():
    stage = Listed({"better": 1.2, "good": 1.0, "as good": 0.99, "GOOD": 0.5, "hard": 0.5})

    [mined] = mine_negatives([EXAMPLE], [stage])

    assert (mined.documents, mined.scores) == (("good", "hard"), (1.0, 0.0))


def test_a_teacher_removes_what_it_finds_relevant():
    teacher = TableScorer({"good": 3.0, "hidden": 3.0, "hard": -2.0})

    [mined] = mine_negatives([EXAMPLE], [Listed({"hidden": 0.6, "hard": 0.5})], teacher=teacher)

    assert mined.negatives == ("hard",)


def test_the_seed_fixes_the_choice():
    stage = Listed({f"d{i}": 1.0 for i in range(40)})

    first, again = (mine_negatives([EXAMPLE], [stage], mining=Mining(per_query=3, seed=5)) for _ in range(2))

    assert first == again
    assert len(first[0].negatives) == 3


def test_embedded_documents_are_searched_exactly():
    documents = [Document("1", "red cat"), Document("2", "blue dog")]

    found = EmbeddedDocuments(documents, HashEmbedder()).search("blue dog", 1)

    assert [(c.document.id, c.rank) for c in found] == [("2", 1)]


def test_mining_without_a_first_stage_is_refused():
    with pytest.raises(InvalidInputError, match="first_stages is empty"):
        mine_negatives([EXAMPLE], [])
