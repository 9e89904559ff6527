"""The three seams: Embedder, FirstStage, Scorer. No base class is needed; having the methods is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qwen_rerank.types import Candidate, Fit


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors. Vectors are L2-normalised float32; a text without tokens gives a zero row."""

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a vector."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, with the model's query prompt."""
        ...

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, with the model's document prompt."""
        ...


@runtime_checkable
class FirstStage(Protocol):
    """Recalls candidates cheaply."""

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return at most `top_k` candidates, best first, ranks from 1."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Says how relevant each document is to one query; knows nothing about top_n, thresholds or frameworks."""

    @property
    def name(self) -> str:
        """Short name for people, e.g. the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a score: model, revision, template, default instruction, max_length, dtype."""
        ...

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """Return log-odds of relevance, float32 `(n_documents,)`, input order, higher is better.

        An empty list gives an empty array without touching a model. Identical texts in one call get identical scores.
        An over-long document is cut at its end to fit. Never sorts, drops or invents a score.

        Raises:
            InvalidInputError: If an argument is wrong; `QueryTooLongError` when the query leaves no room.
            DocumentScoringError: If some documents could not be scored; carries the others' scores.
        """
        ...

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """Return one array as `score` gives for each query, batched across queries."""
        ...

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """As `score`, without blocking the event loop."""
        ...

    async def ascore_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """As `score_many`, without blocking the event loop."""
        ...

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Return for each text its tokens, the room beside this query, and how many characters are kept.

        Raises:
            InvalidInputError: If this scorer has no tokenizer, so that it cannot tell.
        """
        ...
