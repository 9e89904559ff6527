"""The seams, Embedder, FirstStage, Scorer and SecondStage, and what only some of their implementations can do.

No base class is needed; having the methods is enough. Nothing else of a caller's object is ever used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qwen_rerank.types import Candidate, Fit, RankedDocument, Scores


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
class NamedEmbedder(Embedder, Protocol):
    """An embedder that can be loaded again by its name."""

    @property
    def name(self) -> str:
        """The name that `load_embedder` takes."""
        ...


@runtime_checkable
class FirstStage(Protocol):
    """Recalls candidates cheaply."""

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return at most `top_k` candidates, best first, ranks from 1."""
        ...


@runtime_checkable
class AsyncFirstStage(FirstStage, Protocol):
    """A first stage that can search without blocking the event loop."""

    async def asearch(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """As `search`, without blocking the event loop."""
        ...


@runtime_checkable
class SimpleScorer(Protocol):
    """The least that scores: a name and one method. Everything else of a `Scorer` is made from it.

    `score` may take `instruction` by keyword; without it, a call that gives an instruction is refused.
    """

    @property
    def name(self) -> str:
        """Short name for people, e.g. the model."""
        ...

    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Return log-odds of relevance, float32 `(n_documents,)`, input order, higher is better."""
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


@runtime_checkable
class DetailedScorer(Protocol):
    """A scorer that tells what it did beside the log-odds."""

    def score_details(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Scores:
        """Return log-odds, tokens read, characters kept, and the error of each document that failed."""
        ...


@runtime_checkable
class BatchScorer(Protocol):
    """A scorer that batches documents across queries."""

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """Return one array as `Scorer.score` gives for each query."""
        ...


@runtime_checkable
class AsyncScorer(Protocol):
    """A scorer that can be awaited."""

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """As `Scorer.score`, without blocking the event loop."""
        ...


@runtime_checkable
class MeasuringScorer(Protocol):
    """A scorer that can tell how much of a text fits beside a query."""

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Return for each text its tokens, the room beside this query, and how many characters are kept."""
        ...


@runtime_checkable
class FingerprintedScorer(Protocol):
    """A scorer that says when its scores may have changed."""

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a score."""
        ...


@runtime_checkable
class ScaledScorer(Protocol):
    """A scorer that knows whether its scores are probabilities of relevance."""

    @property
    def calibrated(self) -> bool:
        """Whether the sigmoid of a score is a probability of relevance; False where only the order means something."""
        ...


@runtime_checkable
class SecondStage(Protocol):
    """Puts candidates in order: a `Reranker`, a `Cascade`, or anything else with the same methods."""

    @property
    def name(self) -> str:
        """Short name for people, e.g. the model that decides."""
        ...

    @property
    def top_n(self) -> int | None:
        """Longest result; None for all."""
        ...

    def rerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the candidates, most relevant first."""
        ...

    async def arerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `rerank`, without blocking the event loop."""
        ...

    def rerank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence[Candidate]],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[list[RankedDocument]]:
        """Return `rerank` of every query with its candidates, scored together."""
        ...
