"""LlamaIndex's vector store over a `FaissStore`: hybrid queries, filters before the search, deletion, durable."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_rerank.checks import check_count, check_probability
from qwen_rerank.errors import InvalidInputError, MissingExtraError

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.schema import BaseNode, MetadataMode, TextNode
    from llama_index.core.vector_stores.types import (
        BasePydanticVectorStore,
        FilterCondition,
        FilterOperator,
        MetadataFilter,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
    from llama_index.core.vector_stores.utils import metadata_dict_to_node
except ImportError as exc:
    raise MissingExtraError("QwenVectorStore", package="llama-index-core", extra="llama-index", cause=exc) from exc

from qwen_rerank.protocols import Embedder
from qwen_rerank.store import FaissStore
from qwen_rerank.types import Candidate, Document
from qwen_rerank.vector_stores import (
    NODE_KEYS,
    FrameworkEmbedder,
    check_no_more,
    diverse,
    matrix,
    open_folder,
    without_node,
)

SOURCE = "ref_doc_id"  # metadata key of the document that a node was cut from
_CONTENT, _TYPE, _OWN_SOURCE = NODE_KEYS
_MMR_FETCH = 4  # candidates for each document that a diverse query returns
_MODES = {
    VectorStoreQueryMode.DEFAULT: "dense",
    VectorStoreQueryMode.MMR: "dense",
    VectorStoreQueryMode.HYBRID: "hybrid",
    VectorStoreQueryMode.SEMANTIC_HYBRID: "hybrid",
    VectorStoreQueryMode.SPARSE: "lexical",
    VectorStoreQueryMode.TEXT_SEARCH: "lexical",
}
_OPERATORS = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.IN: "$in",
    FilterOperator.NIN: "$nin",
    FilterOperator.CONTAINS: "$contains",
}


class QwenVectorStore(BasePydanticVectorStore):
    """A `FaissStore` as a LlamaIndex vector store. LangChain's `QwenVectorStore` opens the same folder.

    LlamaIndex brings the vectors of nodes and queries itself, so the store needs no embedder of its own. The mode of a
    query is the query's: "default" compares vectors, "hybrid" fuses them with words (`alpha` is the vectors' share, 0 to
    1), "sparse" and "text_search" rank by words, "mmr" looks for nodes that differ. Filters are applied before the
    search. Adding a node whose id is there replaces it.

    Args:
        store: The store that is searched and written to; `close` it in the end.
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    flat_metadata: bool = False
    _store: FaissStore = PrivateAttr()

    def __init__(self, store: FaissStore) -> None:
        if not isinstance(store, FaissStore):
            raise InvalidInputError(
                f"store must be a FaissStore, not {type(store).__name__}; or use from_folder(path)."
            )
        super().__init__(stores_text=True)
        self._store = store

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        embed_model: BaseEmbedding | Embedder | None = None,
        *,
        read_only: bool = False,
        **options: Any,
    ) -> QwenVectorStore:
        """Return a vector store over a folder; the folder's store is made if there is none.

        Args:
            path: The store's folder.
            embed_model: LlamaIndex's embedding model or one of our embedders: it says how long vectors are and which
                model made them. None opens any store as it is, and makes one of words alone.
            read_only: Read beside a writer; the store must be there.
            options: As for `FaissStore.create`.
        """
        made_with = {"indexed_fields": [SOURCE], **options}
        return cls(open_folder(path, as_embedder(embed_model), read_only=read_only, **made_with))

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises it."""
        return "QwenVectorStore"

    @property
    def client(self) -> FaissStore:
        """The store underneath."""
        return self._store

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    # Writing

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes with their vectors, all of them or none, and return their ids."""
        documents = [_stored(node) for node in nodes]
        if not self._store.dim or not nodes:
            return self._store.upsert(documents)
        for node in nodes:
            if node.embedding is None:
                raise InvalidInputError(
                    f"the node {node.node_id!r} has no embedding; set it, or add the node by a VectorStoreIndex."
                )
        return self._store.upsert(documents, vectors=matrix([node.get_embedding() for node in nodes]))

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """As `add`, without blocking the event loop."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove all nodes of a document."""
        self._store.delete(filter={SOURCE: ref_doc_id})

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """As `delete`, without blocking the event loop."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove nodes by id, by filters, or those of the ids that meet the filters."""
        if node_ids is not None and filters is not None:
            node_ids = [node.node_id for node in self.get_nodes(node_ids, filters)]
            filters = None
        self._store.delete(node_ids, filter=as_filter(filters))

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """As `delete_nodes`, without blocking the event loop."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    def clear(self) -> None:
        """Remove all nodes."""
        self._store.delete(self._store.ids())

    async def aclear(self) -> None:
        """As `clear`, without blocking the event loop."""
        await asyncio.to_thread(self.clear)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Do nothing: what was added is on the disk already."""

    # Reading

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return nodes by id, by filters, or those of the ids that meet the filters; all of them without either."""
        found = self._store.get(node_ids) if node_ids is not None else list(self._store)
        condition = as_filter(filters)
        if condition is not None:
            kept = set(self._store.ids(filter=condition))
            found = [document for document in found if document.id in kept]
        return [_node(document) for document in found]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """As `get_nodes`, without blocking the event loop."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As `query`, without blocking the event loop."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return the best nodes with their similarities, higher is better.

        Args:
            query: What is asked.
            kwargs: `mmr_threshold`, in place of the query's, is what a retriever's `vector_store_kwargs` give.

        Raises:
            InvalidInputError: If the query's mode or one of its filters is not known here; says what there is.
        """
        share = kwargs.pop("mmr_threshold", query.mmr_threshold)
        check_no_more("query", kwargs, known=("mmr_threshold",))
        mode = _MODES.get(query.mode)
        if mode is None:
            known = ", ".join(one.value for one in _MODES)
            raise InvalidInputError(f"mode={query.mode.value!r} is not known; there are {known}.")
        top_k = query.similarity_top_k
        if mode == "hybrid" and query.hybrid_top_k is not None:
            top_k = query.hybrid_top_k
        check_count("similarity_top_k", top_k)
        sources = {SOURCE: {"$in": query.doc_ids}} if query.doc_ids else None
        conditions = [one for one in (as_filter(query.filters), sources) if one is not None]
        filter = {"$and": conditions} if conditions else None
        diverse_query = query.mode is VectorStoreQueryMode.MMR
        # Few ids are asked for among all: everything is ranked, and what is not asked for dropped.
        wanted = len(self._store) if query.node_ids else top_k * _MMR_FETCH if diverse_query else top_k
        found = self._search(query, mode, max(1, wanted), filter)
        if query.node_ids:
            found = [hit for hit in found if hit.document.id in set(query.node_ids)]
        if diverse_query:
            vectors = self._store.vectors_of([hit.document.id for hit in found])
            share = 0.5 if share is None else check_probability("mmr_threshold", share)
            chosen = diverse(np.asarray(query.query_embedding, np.float32), vectors, k=top_k, lambda_mult=share)
            found = [found[n] for n in chosen]
        found = found[:top_k]
        return VectorStoreQueryResult(
            nodes=[_node(hit.document) for hit in found],
            similarities=[hit.score or 0.0 for hit in found],
            ids=[hit.document.id for hit in found],
        )

    def _search(
        self, query: VectorStoreQuery, mode: str, top_k: int, filter: Mapping[str, Any] | None
    ) -> list[Candidate]:
        if mode != "lexical" and query.query_embedding is None:
            raise InvalidInputError(
                f"mode={query.mode.value!r} compares vectors, but the query has no query_embedding."
            )
        if mode == "dense":
            return self._store.search_vectors(np.asarray([query.query_embedding]), top_k, filter=filter)[0]
        if not query.query_str:
            raise InvalidInputError(f"mode={query.mode.value!r} looks for words, but the query has no query_str.")
        if mode == "lexical":
            return self._store.search(query.query_str, top_k, mode=mode, filter=filter)
        weights = None if query.alpha is None else (query.alpha, 1 - query.alpha)
        vectors = np.asarray([query.query_embedding])
        return self._store.search_many(
            [query.query_str], top_k, mode=mode, filter=filter, weights=weights, vectors=vectors
        )[0]


def as_filter(filters: MetadataFilters | None) -> Mapping[str, Any] | None:
    """Return LlamaIndex's filters in the store's language; None for none.

    Raises:
        InvalidInputError: If an operator is not known here; says which are.
    """
    if filters is None or not filters.filters:
        return None
    parts = [as_filter(one) or {} if isinstance(one, MetadataFilters) else _condition(one) for one in filters.filters]
    if filters.condition == FilterCondition.NOT:
        return {"$not": {"$or": parts}}
    return {"$or" if filters.condition == FilterCondition.OR else "$and": parts}


def _condition(one: MetadataFilter) -> Mapping[str, Any]:
    if one.operator in _OPERATORS:
        return {one.key: {_OPERATORS[one.operator]: one.value}}
    if one.operator == FilterOperator.IS_EMPTY:
        return {"$or": [{one.key: {"$exists": False}}, {one.key: None}, {one.key: {"$eq": []}}]}
    if one.operator in (FilterOperator.ANY, FilterOperator.ALL) and isinstance(one.value, list) and one.value:
        parts = [{one.key: {"$contains": value}} for value in one.value]
        return {"$or" if one.operator == FilterOperator.ANY else "$and": parts}
    known = ", ".join(
        known.value for known in (*_OPERATORS, FilterOperator.ANY, FilterOperator.ALL, FilterOperator.IS_EMPTY)
    )
    raise InvalidInputError(
        f"the filter on {one.key!r} has the operator {one.operator.value!r} with {one.value!r}; there are {known}, of "
        "which any and all take a list with something in it."
    )


class _LlamaIndexEmbedder(FrameworkEmbedder):
    def __init__(self, model: BaseEmbedding) -> None:
        super().__init__(
            model,
            queries=lambda texts: [model.get_query_embedding(text) for text in texts],
            documents=model.get_text_embedding_batch,
        )


def as_embedder(model: BaseEmbedding | Embedder | None) -> Embedder | None:
    """Return LlamaIndex's embedding model as an `Embedder`; ours, and None, as they are."""
    return _LlamaIndexEmbedder(model) if isinstance(model, BaseEmbedding) else model


def _stored(node: BaseNode) -> Document:
    """Return a node as a document: its text, its metadata, and the rest of it as JSON in hidden metadata."""
    rest = node.model_dump(mode="json", exclude={"embedding", "metadata", "text", "text_resource"})
    metadata = {**node.metadata, _CONTENT: json.dumps(rest, ensure_ascii=False), _TYPE: node.class_name()}
    if SOURCE in node.metadata:
        metadata[_OWN_SOURCE] = node.metadata[SOURCE]
    if node.ref_doc_id is not None:
        metadata[SOURCE] = node.ref_doc_id
    return Document(node.node_id, node.get_content(metadata_mode=MetadataMode.NONE), metadata)


def _node(document: Document) -> BaseNode:
    """Return the node that `_stored` kept, or a plain one of a document that came from elsewhere."""
    metadata = without_node(document.metadata)
    if _CONTENT not in document.metadata:
        return TextNode(id_=document.id, text=document.text, metadata=metadata)
    metadata.pop(SOURCE, None)
    if _OWN_SOURCE in document.metadata:
        metadata[SOURCE] = document.metadata[_OWN_SOURCE]
    node = metadata_dict_to_node(dict(document.metadata), text=document.text)
    node.metadata = metadata
    return node
