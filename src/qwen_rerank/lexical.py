"""A lexical first stage: BM25 over words, with Chinese and Japanese read as characters and pairs of characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qwen_rerank.checks import check_count, check_query, check_text
from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.filters import matches, parse_filter
from qwen_rerank.types import Candidate, Document

try:
    import bm25s
except ImportError as exc:
    raise MissingExtraError("BM25Index", package="bm25s", extra="lexical", cause=exc) from exc

# Han and kana, written without spaces: extension A, the main block, kana, compatibility, and the supplementary planes.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TERM = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")
_IS_CJK = re.compile(rf"[{_CJK}]")

# The English words that Lucene's StandardAnalyzer leaves out.
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "for",
        "if",
        "in",
        "into",
        "is",
        "it",
        "no",
        "not",
        "of",
        "on",
        "or",
        "such",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "will",
        "with",
    ]
)


def terms(text: str) -> list[str]:
    """Return the terms of a text in reading order: lower-cased words, and characters and bigrams of CJK runs.

    >>> terms("The 量子位 of BM25")
    ['量', '子', '位', '量子', '子位', 'bm25']
    """
    found: list[str] = []
    for term in _TERM.findall(unicodedata.normalize("NFKC", text).lower()):
        if _IS_CJK.match(term):
            found += term
            found += [term[i : i + 2] for i in range(len(term) - 1)]
        elif term not in STOP_WORDS:
            found.append(term)
    return found


class BM25Index:
    """BM25 in memory, a first stage that needs no model.

    Args:
        documents: What is searched; strings get a hash as id. Ids must differ.
        k1: How soon repeated terms stop counting, above 0.
        b: How much long documents are marked down, 0 to 1.
    """

    def __init__(self, documents: Iterable[Document | str], *, k1: float = 0.9, b: float = 0.4) -> None:
        self._documents = [_document(i, document) for i, document in enumerate(documents)]
        _check_ids(self._documents)
        self._index = bm25s.BM25(k1=k1, b=b)
        tokens = [terms(document.text) for document in self._documents]
        self._has_terms = any(tokens)
        if self._has_terms:
            self._index.index(tokens, show_progress=False)

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
        known = [term for term in terms(query) if self._has_terms and term in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        found = np.flatnonzero(scores > 0)
        if condition is not None:
            found = np.array([i for i in found if matches(condition, self._documents[i].metadata)], dtype=np.intp)
        best = found[np.argsort(-scores[found], kind="stable")][:top_k]
        return [Candidate(self._documents[i], float(scores[i]), rank) for rank, i in enumerate(best, start=1)]


def _document(index: int, document: object) -> Document:
    if isinstance(document, str):
        document = Document.from_text(document)
    if not isinstance(document, Document):
        raise InvalidInputError(f"documents[{index}] must be a string or a Document, not {type(document).__name__}.")
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
