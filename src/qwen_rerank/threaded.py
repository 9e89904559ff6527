"""The asynchronous half of a scorer whose work is synchronous, for scorers that have no better way to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from qwen_rerank.checks import check_texts
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.types import Fit


def check_pairs(queries: object, documents: object) -> tuple[list[str], list[list[str]]]:
    """Return the arguments of `score_many` as lists.

    Raises:
        InvalidInputError: If they are no lists of one length, or hold anything but strings.
    """
    query_list = check_texts("queries", queries)
    if isinstance(documents, str | bytes) or not isinstance(documents, Sequence):
        raise InvalidInputError(
            f"documents must be a list with one list for each query, not {type(documents).__name__}."
        )
    if len(documents) != len(query_list):
        raise InvalidInputError(
            f"documents has {len(documents)} lists for {len(query_list)} queries; give one list of texts for each query."
        )
    return query_list, [check_texts(f"documents[{i}]", texts) for i, texts in enumerate(documents)]


class ThreadedScorer:
    """Gives `score_many`, `ascore` and `ascore_many` to a class that has `score`; the waiting is done in a thread."""

    name: str
    fingerprint: str

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """Return log-odds, float32 `(n_documents,)`; to be written by the class."""
        raise NotImplementedError

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """Return `score` of every query with its documents."""
        query_list, document_lists = check_pairs(queries, documents)
        return [
            self.score(query, texts, instruction=instruction)
            for query, texts in zip(query_list, document_lists, strict=True)
        ]

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """As `score`, in a worker thread."""
        return await asyncio.to_thread(self.score, query, documents, instruction=instruction)

    async def ascore_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """As `score_many`, in a worker thread."""
        return await asyncio.to_thread(self.score_many, queries, documents, instruction=instruction)

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Refuse: without a tokenizer nobody can tell how long a text is."""
        raise InvalidInputError(
            f"{self.name} has no tokenizer, so it cannot tell how much of a document fits; "
            "use long_documents='truncate' with it, or a scorer with a tokenizer."
        )
