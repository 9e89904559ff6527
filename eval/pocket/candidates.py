"""What the pocket reranker learns to order: queries with candidates of our own first stages, and a teacher's opinion.

The teacher puts together word overlap (BM25, as a share of the best passage's), a dense similarity (of all-MiniLM-L6-v2
in English, of the pocket embedder in Chinese) and the label.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sources import Pair

from qwen_rerank.lexical import BM25Index
from qwen_rerank.protocols import Embedder
from qwen_rerank.training import Example
from qwen_rerank.types import Document


@dataclass(frozen=True)
class TeacherWeights:
    """How the teacher's log-odds are made: `bias + overlap * share + dense * similarity`, and a label's least value."""

    bias: float = -5.0
    overlap: float = 6.0
    dense: float = 4.0
    label: float = 3.0
    lead: float = 1.5  # a labelled text stands at least this far above the best other


class Pool:
    """All passages of one language, with both first stages and the teacher's vectors over them.

    Args:
        texts: Passages, all different.
        embedder: The pocket embedder, which finds candidates.
        teacher: Judges them.
    """

    def __init__(self, texts: Sequence[str], embedder: Embedder, teacher: Embedder) -> None:
        self.texts = list(texts)
        self.place = {text: i for i, text in enumerate(self.texts)}
        self._bm25 = BM25Index([Document(str(i), text) for i, text in enumerate(self.texts)])
        self._embedder = embedder
        self._embedded = embedder.embed_documents(self.texts)
        self._teacher = teacher
        self._judged = teacher.embed_documents(self.texts)

    def example(self, pair: Pair, weights: TeacherWeights, generator: random.Random, *, n: int) -> Example | None:
        """Return the pair with `n - 1` candidates and the teacher's log-odds for all; None without candidates."""
        own = self.place[pair.document]
        overlap = {int(c.document.id): float(c.score or 0.0) for c in self._bm25.search(pair.query, 200)}
        similar = self._embedded @ self._embedder.embed_queries([pair.query])[0]
        near = np.argpartition(-similar, 30)[:30]
        lexical = list(overlap)[:30]
        hard = [i for i in dict.fromkeys([*lexical, *near.tolist()]) if i != own and not self._same(i, pair)]
        if not overlap or not hard:
            return None
        chosen = [own, *generator.sample(hard, min(n - 3, len(hard)))]
        chosen += [i for i in generator.sample(range(len(self.texts)), n - len(chosen)) if i not in chosen]
        best = max(overlap.values())
        alike = self._judged[chosen] @ self._teacher.embed_queries([pair.query])[0]
        log_odds = [
            weights.bias + weights.overlap * overlap.get(i, 0.0) / best + weights.dense * float(likeness)
            for i, likeness in zip(chosen, alike, strict=True)
        ]
        log_odds[0] = max(log_odds[0], weights.label, max(log_odds[1:]) + weights.lead)
        return Example(pair.query, tuple(self.texts[i] for i in chosen), tuple(log_odds), teacher=True)

    def _same(self, i: int, pair: Pair) -> bool:
        """Whether a passage holds the query itself or shares its text with the positive: no negative then."""
        text = self.texts[i]
        return pair.query in text or text[:60] in pair.document


def keyword_query(text: str, frequency: Mapping[str, int], terms: Sequence[str], generator: random.Random) -> str:
    """Return a short query of the rarest terms of a text, as people type into a search box."""
    ranked = sorted(dict.fromkeys(terms), key=lambda term: frequency[term])[:8]
    chosen = set(generator.sample(ranked, min(len(ranked), generator.randint(2, 4))))
    joined = [term for term in dict.fromkeys(terms) if term in chosen]
    return " ".join(joined) if text.isascii() else "".join(joined)
