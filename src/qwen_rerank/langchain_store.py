"""LangChain's vector store over a `FaissStore`: hybrid search, filters before the search, durable, nothing unpickled."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Self

import numpy as np

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError, MissingExtraError

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.structured_query import (
        Comparator,
        Comparison,
        FilterDirective,
        Operation,
        Operator,
        StructuredQuery,
        Visitor,
    )
    from langchain_core.vectorstores import VectorStore
except ImportError as exc:
    raise MissingExtraError("QwenVectorStore", package="langchain-core", extra="langchain", cause=exc) from exc

from qwen_rerank.protocols import Embedder
from qwen_rerank.store import FaissStore
from qwen_rerank.types import Candidate
from qwen_rerank.types import Document as PlainDocument
from qwen_rerank.vector_stores import (
    FrameworkEmbedder,
    check_no_more,
    diverse,
    matrix,
    open_folder,
    relevance,
    without_node,
)

Filter = Mapping[str, Any] | FilterDirective

_COMPARATORS = {
    Comparator.EQ: "$eq",
    Comparator.NE: "$ne",
    Comparator.GT: "$gt",
    Comparator.GTE: "$gte",
    Comparator.LT: "$lt",
    Comparator.LTE: "$lte",
    Comparator.CONTAIN: "$contains",
    Comparator.IN: "$in",
    Comparator.NIN: "$nin",
}


class QwenVectorStore(VectorStore):
    """A `FaissStore` as a LangChain vector store. LlamaIndex's `QwenVectorStore` opens the same folder.

    Searches are hybrid where the store has words, which new ones have; `mode="dense"` compares vectors alone, here for
    all searches or as `search_kwargs={"mode": "dense"}` for some. A filter is a dict such as `{"year": {"$gte": 2020}}`
    (`qwen_rerank.filters` describes them) or a structured query's filter; it is applied before the search, so that `k`
    documents come back where as many match. Adding a document whose id is there replaces it.

    Args:
        store: The store that is searched and written to; `close` it in the end.
        mode: Of searches that name none: "hybrid", "dense", "lexical"; None is the best that the store has.
    """

    def __init__(self, store: FaissStore, *, mode: str | None = None) -> None:
        if not isinstance(store, FaissStore):
            raise InvalidInputError(
                f"store must be a FaissStore, not {type(store).__name__}; or use from_folder(path)."
            )
        self.store = store
        self.mode = mode

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        embedding: Embeddings | Embedder | None = None,
        *,
        mode: str | None = None,
        read_only: bool = False,
        **options: Any,
    ) -> Self:
        """Return a vector store over a folder; the folder's store is made if there is none.

        Args:
            path: The store's folder.
            embedding: LangChain's embeddings or one of ours; None searches by words alone.
            mode: As for the class.
            read_only: Read beside a writer; the store must be there.
            options: As for `FaissStore.create`.
        """
        return cls(open_folder(path, as_embedder(embedding), read_only=read_only, **options), mode=mode)

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Return a vector store over the folder `path` with these texts added; `options` as for `from_folder`."""
        if path is None:
            raise InvalidInputError("path is missing; name the folder that keeps the store, path='my-store'.")
        made = cls.from_folder(path, embedding, **options)
        try:
            made.add_texts(texts, metadatas, ids=ids)
        except BaseException:
            made.close()  # nobody else can, and the folder would stay locked
            raise
        return made

    @property
    def embeddings(self) -> Embeddings | None:
        """The embedding model, where it is one of LangChain's."""
        model = getattr(self.store.embedder, "model", None)
        return model if isinstance(model, Embeddings) else None

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    # Writing

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Store texts, all of them or none, and return their ids; a text without an id gets a new one."""
        plain = list(texts)
        metadatas = None if metadatas is None else list(metadatas)
        for name, given in (("metadatas", metadatas), ("ids", ids)):
            if given is not None and len(given) != len(plain):
                raise InvalidInputError(f"{name} has {len(given)} entries for {len(plain)} texts; give one a text.")
        names = [one or uuid.uuid4().hex for one in ids or [None] * len(plain)]
        about = metadatas or [{}] * len(plain)
        self.store.upsert(map(PlainDocument, names, plain, (one or {} for one in about)))
        return names

    def delete(self, ids: list[str] | None = None, *, filter: Filter | None = None, **kwargs: Any) -> bool | None:
        """Remove documents by id or by filter; ids that are not there are passed over."""
        check_no_more("delete", kwargs, known=("ids", "filter"))
        self.store.delete(ids, filter=as_filter(filter))
        return True

    # Reading

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents with these ids; unknown ids are left out."""
        return [_document(found) for found in self.store.get(ids)]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Return the `k` best documents; takes `filter`, `mode` and `weights` as `FaissStore.search` does."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """Return the `k` best documents with the store's own scores, higher is better."""
        return [(_document(hit.document), hit.score or 0.0) for hit in self._search(query, k, **kwargs)]

    def _similarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        kwargs.pop("score_threshold", None)  # the caller applies it
        return [
            (_document(hit.document), relevance(hit, weights=kwargs.get("weights")))
            for hit in self._search(query, k, **kwargs)
        ]

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """Return the `k` documents whose vectors are most similar to a vector; takes `filter`."""
        return [_document(hit.document) for hit in self._nearest(embedding, k, **kwargs)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return `k` documents of the `fetch_k` best ones that differ from one another; takes `filter` and `mode`."""
        if self.store.embedder is None:
            raise InvalidInputError(
                "a search for diverse documents compares vectors; open the store with its embedder."
            )
        [vector] = self.store.embedder.embed_queries([query])
        return self._diverse(self._search(query, max(k, fetch_k), **kwargs), vector, k, lambda_mult)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return `k` of the `fetch_k` documents most similar to a vector that differ from one another."""
        found = self._nearest(embedding, max(k, fetch_k), **kwargs)
        return self._diverse(found, np.asarray(embedding, dtype=np.float32), k, lambda_mult)

    def _search(
        self,
        query: str,
        k: int,
        *,
        filter: Filter | None = None,
        mode: str | None = None,
        weights: Sequence[float] | None = None,
        **more: Any,
    ) -> list[Candidate]:
        check_no_more("the search", more, known=("filter", "mode", "weights"))
        return self.store.search(query, k, mode=mode or self.mode, filter=as_filter(filter), weights=weights)

    def _nearest(
        self, embedding: Sequence[float], k: int, *, filter: Filter | None = None, **more: Any
    ) -> list[Candidate]:
        check_no_more("the search by vector", more, known=("filter",))
        return self.store.search_vectors(matrix([embedding]), k, filter=as_filter(filter))[0]

    def _diverse(self, found: list[Candidate], vector: np.ndarray, k: int, lambda_mult: float) -> list[Document]:
        check_count("k", k)
        vectors = self.store.vectors_of([hit.document.id for hit in found])
        return [_document(found[n].document) for n in diverse(vector, vectors, k=k, lambda_mult=lambda_mult)]


class QwenTranslator(Visitor):
    """Translates a structured query's filter, as `SelfQueryRetriever` writes them, into the store's language."""

    allowed_comparators = tuple(_COMPARATORS)
    allowed_operators = (Operator.AND, Operator.OR, Operator.NOT)

    def visit_operation(self, operation: Operation) -> dict[str, Any]:
        """Return the filter of several conditions."""
        parts = [part.accept(self) for part in operation.arguments]
        if operation.operator == Operator.NOT:
            return {"$not": parts[0] if len(parts) == 1 else {"$and": parts}}
        return {"$and" if operation.operator == Operator.AND else "$or": parts}

    def visit_comparison(self, comparison: Comparison) -> dict[str, Any]:
        """Return the filter of one condition."""
        operator = _COMPARATORS.get(comparison.comparator)
        if operator is None:
            known = ", ".join(one.value for one in _COMPARATORS)
            raise InvalidInputError(f"filter has the comparator {comparison.comparator.value!r}; there are {known}.")
        return {comparison.attribute: {operator: _value(comparison.value)}}

    def visit_structured_query(self, structured_query: StructuredQuery) -> tuple[str, dict[str, Any]]:
        """Return the query's text and the search's arguments."""
        asked = structured_query.filter
        return structured_query.query, {} if asked is None else {"filter": asked.accept(self)}


def _value(value: object) -> object:
    """Return a comparison's value; the parser's dates, `{"date": "2024-01-01", "type": "date"}`, as dates."""
    if isinstance(value, list | tuple):
        return [_value(one) for one in value]
    if isinstance(value, Mapping) and value.get("type") in ("date", "datetime") and value["type"] in value:
        value = value[value["type"]]
        with suppress(ValueError):  # what is no date is compared as the text that it is
            return datetime.fromisoformat(value) if isinstance(value, str) else value
    return value


def as_filter(filter: object) -> Mapping[str, Any] | None:
    """Return a filter as the store takes it: a dict as it is, a structured query's filter translated."""
    if isinstance(filter, FilterDirective):
        translated = filter.accept(QwenTranslator())
        return translated if isinstance(translated, Mapping) else None
    if filter is None or isinstance(filter, Mapping):
        return filter
    raise InvalidInputError(
        f"filter must be a dict such as {{'lang': 'en'}} or a structured query's filter, not {type(filter).__name__}."
    )


class _LangChainEmbedder(FrameworkEmbedder):
    def __init__(self, model: Embeddings) -> None:
        self.model = model
        # One by one: `embed_query` is what LangChain models give a query's prompt in.
        super().__init__(
            model, queries=lambda texts: [model.embed_query(text) for text in texts], documents=model.embed_documents
        )


def as_embedder(embedding: Embeddings | Embedder | None) -> Embedder | None:
    """Return LangChain's embeddings as an `Embedder`; ours, and None, as they are."""
    return _LangChainEmbedder(embedding) if isinstance(embedding, Embeddings) else embedding


def _document(document: PlainDocument) -> Document:
    return Document(id=document.id, page_content=document.text, metadata=without_node(document.metadata))
