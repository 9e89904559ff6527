"""Hard negatives: what a first stage puts near the top although nobody called it relevant."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qwen_rerank.checks import check_count, check_probability
from qwen_rerank.documents import Example
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import Embedder, FirstStage, Scorer
from qwen_rerank.types import Candidate, Document


class EmbeddedDocuments:
    """A first stage over vectors in memory, exact.

    Args:
        documents: What is searched.
        embedder: Gives the vectors.
    """

    def __init__(self, documents: Sequence[Document], embedder: Embedder) -> None:
        self._documents = list(documents)
        self._embedder = embedder
        self._vectors = embedder.embed_documents([document.text for document in self._documents])

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return the `top_k` nearest documents, best first.

        Raises:
            InvalidInputError: If a filter is given; there is no metadata to filter by.
        """
        if filter is not None:
            raise InvalidInputError(
                f"filter ({filter!r}) is not supported here; use a FaissStore for filtered searches."
            )
        scores = self._vectors @ self._embedder.embed_queries([query])[0]
        best = np.argsort(-scores, kind="stable")[: check_count("top_k", top_k)]
        return [Candidate(self._documents[i], float(scores[i]), rank) for rank, i in enumerate(best, start=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mining:
    """The settings by which negatives are chosen.

    Attributes:
        per_query: Negatives added to each example.
        depth: Candidates asked of each first stage.
        margin: A candidate is left out when its first-stage score is above `1 - margin` times the best positive's, or
            when the teacher puts it above `1 - margin` times the positive's probability: it may be relevant.
        seed: Fixes which of the remaining candidates are taken.
    """

    per_query: int = 7
    depth: int = 50
    margin: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("per_query", self.per_query)
        check_count("depth", self.depth)
        check_probability("margin", self.margin)


def mine_negatives(
    examples: Sequence[Example],
    first_stages: Sequence[FirstStage],
    *,
    mining: Mining | None = None,
    teacher: Scorer | None = None,
) -> list[Example]:
    """Return the examples with negatives added, in order; an example with teacher scores is returned as it is.

    Args:
        examples: Queries with at least one positive.
        first_stages: Candidates are taken from each in turn.
        mining: How to choose; None means the defaults.
        teacher: A scorer whose opinion removes unlabelled relevant documents; it reads every candidate.

    Raises:
        InvalidInputError: If no first stage is given.
    """
    if not first_stages:
        raise InvalidInputError("first_stages is empty; give at least one to mine negatives with.")
    mining = mining or Mining()
    generator = random.Random(mining.seed)
    return [
        example if example.teacher else _with_negatives(example, first_stages, mining, teacher, generator)
        for example in examples
    ]


def _with_negatives(
    example: Example,
    first_stages: Sequence[FirstStage],
    mining: Mining,
    teacher: Scorer | None,
    generator: random.Random,
) -> Example:
    known = {_normal(text) for text in example.documents}
    pool: dict[str, str] = {}
    for first_stage in first_stages:
        candidates = first_stage.search(example.query, mining.depth)
        for candidate in _below_positive(candidates, example, mining.margin):
            pool.setdefault(_normal(candidate.document.text), candidate.document.text)
    texts = [text for key, text in pool.items() if key and key not in known]
    if teacher is not None and texts:
        texts = _teacher_agrees(example, texts, teacher, mining.margin)
    chosen = generator.sample(texts, min(mining.per_query, len(texts)))
    return replace(
        example,
        documents=(*example.documents, *chosen),
        scores=(*example.scores, *(0.0 for _ in chosen)),
    )


def _below_positive(candidates: Sequence[Candidate], example: Example, margin: float) -> list[Candidate]:
    """Return the candidates that the first stage puts clearly below the best positive it found."""
    positives = {_normal(text) for text in example.positives}
    scores = [c.score for c in candidates if c.score is not None and _normal(c.document.text) in positives]
    if not scores:
        return list(candidates)
    limit = max(scores) - margin * abs(max(scores))
    return [c for c in candidates if c.score is None or c.score <= limit]


def _teacher_agrees(example: Example, texts: list[str], teacher: Scorer, margin: float) -> list[str]:
    positives = list(example.positives)
    log_odds = teacher.score(example.query, [*positives, *texts])
    probability = 1.0 / (1.0 + np.exp(-log_odds.astype(np.float64)))
    limit = (1.0 - margin) * float(probability[: len(positives)].max())
    return [text for text, p in zip(texts, probability[len(positives) :], strict=True) if p <= limit]


def _normal(text: str) -> str:
    """Return the text without differences of case and white space, which make no other document."""
    return " ".join(text.lower().split())
