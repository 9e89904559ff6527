"""A lexical first stage: BM25 over words in memory, with Chinese, Japanese and Korean read as pairs of characters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qwen_rerank.checks import check_count, check_probability, check_query, check_text, kind_of
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.filters import matches, parse_filter
from qwen_rerank.types import Candidate, Document
from qwen_rerank.words import WordIndex
from qwen_rerank.words import terms as terms


class BM25Index:
    """BM25 in memory, a first stage that needs no model.

    Args:
        documents: What is searched; strings get a hash as id. Ids must differ.
        k1: How soon repeated terms stop counting, above 0.
        b: How much long documents are marked down, 0 to 1.
    """

    def __init__(self, documents: Iterable[Document | str], *, k1: float = 0.9, b: float = 0.4) -> None:
        if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
            raise InvalidInputError(f"documents must be a list of texts or Documents, not {kind_of(documents)}.")
        if isinstance(k1, bool) or not isinstance(k1, int | float) or not 0 < k1 < math.inf:
            raise InvalidInputError(f"k1 must be a number above 0, not {k1!r}.")
        check_probability("b", b)
        self._documents = [_document(i, document) for i, document in enumerate(documents)]
        _check_ids(self._documents)
        self._index = WordIndex(k1=k1, b=b)
        self._index.add(np.arange(len(self._documents)), [document.text for document in self._documents])

    def __len__(self) -> int:
        return len(self._documents)

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return at most `top_k` documents that share a term with the query, best first; ties keep their order.

        Args:
            query: What is searched for.
            top_k: Longest result.
            filter: What a document's metadata must be, for example `{"language": "zh", "year": {"$gte": 2020}}`, as
                `qwen_rerank.filters` describes it; None for all documents.
        """
        check_query(query)
        check_count("top_k", top_k)
        condition = None if filter is None else parse_filter(filter)
        rows, scores = self._index.search(query, top_k if condition is None else max(1, len(self)))
        found = [(self._documents[row], score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]
        if condition is not None:
            found = [(document, score) for document, score in found if matches(condition, document.metadata)][:top_k]
        return [Candidate(document, score, rank, "bm25") for rank, (document, score) in enumerate(found, start=1)]


def _document(index: int, document: object) -> Document:
    if isinstance(document, str):
        document = Document.from_text(document)
    if not isinstance(document, Document):
        raise InvalidInputError(f"documents[{index}] must be a string or a Document, not {kind_of(document)}.")
    check_text(f"documents[{index}]", document.text)
    return document


def _check_ids(documents: list[Document]) -> None:
    seen: set[str] = set()
    for index, document in enumerate(documents):
        if document.id in seen:
            raise InvalidInputError(
                f"documents[{index}] repeats the id {document.id!r}; give every document its own id."
            )
        seen.add(document.id)
