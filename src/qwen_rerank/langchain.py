"""LangChain: a document compressor, a two-stage retriever, and any LangChain retriever as a first stage."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Self

from qwen_rerank.errors import InvalidInputError, MissingExtraError

try:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.retrievers import BaseRetriever, RetrieverLike
    from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.langchain", package="langchain-core", extra="langchain", cause=exc) from exc

from pydantic import ConfigDict, Field, model_validator

from qwen_rerank.adapters import (
    ALL,
    Count,
    LazyReranker,
    OptionalCount,
    RerankSettings,
    TopNSettings,
    check_search,
    check_stages,
    copied,
    score_of,
)
from qwen_rerank.checks import check_count, check_query, is_finite
from qwen_rerank.langchain_store import QwenVectorStore
from qwen_rerank.pipeline import TwoStageRetriever
from qwen_rerank.protocols import FirstStage
from qwen_rerank.types import Candidate, RankedDocument, text_id
from qwen_rerank.types import Document as PlainDocument

__all__ = ["LangChainFirstStage", "QwenRerankCompressor", "QwenRerankRetriever", "QwenVectorStore", "from_langchain"]

# Where retrievers leave their own score. An earlier reranker's "relevance_score" is not among them.
RETRIEVAL_SCORE_KEYS = ("retrieval_score", "score", "_score", "similarity_score", "@search.score")
FETCH_K = 100  # candidates of a first stage that is asked for no other number


class QwenRerankCompressor(TopNSettings, BaseDocumentCompressor):
    """Reranks documents and keeps the best; a `base_compressor` for `ContextualCompressionRetriever`.

    Give a model name, or a `scorer`, or a `reranker`; with none of them the model is Qwen/Qwen3-Reranker-0.6B. A name
    is any that `load_scorer` knows, and loads on first use. Returned documents are copies: `id` and all metadata stay,
    `metadata["relevance_score"]` is the score in [0, 1], and `metadata["retrieval_score"]` is the first stage's score
    where the input carried one, under one of `RETRIEVAL_SCORE_KEYS`. A second rerank replaces the first one's
    `relevance_score`. A document that a reranker with `on_error="last"` could not score has `relevance_score` None and
    the reason in `metadata["rerank_error"]`.

    A trap of LangChain: `ContextualCompressionRetriever.invoke(query, k=3)` hands `k` to the *base* retriever, so the
    compressor sees three candidates and has nothing to choose from. Set `top_n` here, or use `QwenRerankRetriever`,
    whose `k` counts answers and whose `fetch_k` counts candidates.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents as copies, best first; no documents give an empty list.

        Args:
            documents: The candidates, best first; ties keep this order. They stay untouched.
            query: The question.
            callbacks: Where the step reports itself, as a run of its own named "rerank".

        Raises:
            InvalidInputError: If the query is empty or an item is no LangChain document.
            ScorerError: If scoring fails.
        """
        return self.as_runnable().invoke({"query": query, "documents": documents}, config={"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """As `compress_documents`, without blocking the event loop."""
        inputs = {"query": query, "documents": documents}
        return await self.as_runnable().ainvoke(inputs, config={"callbacks": callbacks})

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Return the step for a chain: it takes `{"query": str, "documents": [...]}` and gives the best documents.

        ```python
        chain = RunnableParallel(documents=retriever, query=RunnablePassthrough()) | compressor.as_runnable()
        ```
        """
        second_stage = LazyReranker(self)

        def rerank(inputs: dict[str, Any]) -> list[Document]:
            documents, query = _read(inputs)
            hits = second_stage.rerank(query, _candidates(documents), top_n=ALL if self.top_n is None else self.top_n)
            return [_scored(documents[hit.index], hit) for hit in hits]

        async def arerank(inputs: dict[str, Any]) -> list[Document]:
            documents, query = _read(inputs)
            hits = await second_stage.arerank(
                query, _candidates(documents), top_n=ALL if self.top_n is None else self.top_n
            )
            return [_scored(documents[hit.index], hit) for hit in hits]

        return RunnableLambda(rerank, arerank, name="rerank")


class QwenRerankRetriever(RerankSettings, BaseRetriever):
    """Two stages behind one retriever: `fetch_k` candidates from the first stage, the best `k` of them as answers.

    The first stage is either a `first_stage` of this package (`FaissStore`, `BM25Index`, ...) or, as `base_retriever`,
    any LangChain retriever. The second is a `compressor`, or what `QwenRerankCompressor` takes: a model name, a
    `scorer` or a `reranker`. All of `k`, `fetch_k` and, with a `first_stage`, `filter` can also be given in a call:
    `retriever.invoke(query, k=3)` returns three answers out of just as many candidates as before.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    first_stage: Any = Field(default=None, description="A first stage of this package.")
    base_retriever: Any = Field(default=None, description="A LangChain retriever to take the candidates from.")
    compressor: QwenRerankCompressor | None = Field(
        default=None,
        description="The second stage, instead of model, scorer or reranker; its top_n does not count here.",
    )
    k: Count = Field(default=10, description="Answers.")
    fetch_k: OptionalCount = Field(
        default=None,
        description="Candidates, never fewer than k. None: 100 of a first_stage, or what the base_retriever gives. A "
        "base_retriever without a parameter k is cut to fetch_k.",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        check_stages(self.first_stage, self.base_retriever, framework="LangChain", retriever=Runnable)
        if self.compressor is not None and (changed := self._changed(list(RerankSettings.model_fields))):
            raise InvalidInputError(f"compressor brings its own {changed[0]}; give it to the compressor instead.")
        return self

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        fetch_k: int | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        line = self._line(run_manager.get_child(), k, fetch_k, filter)
        return _answers(line.first_stage, line.retrieve(query, filter=filter))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        fetch_k: int | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        line = self._line(run_manager.get_child(), k, fetch_k, filter)
        return _answers(line.first_stage, await line.aretrieve(query, filter=filter))

    def _line(
        self, callbacks: Callbacks, k: int | None, fetch_k: int | None, filter: Mapping[str, Any] | None
    ) -> TwoStageRetriever:
        """Return the two stages of one call, each a run of its own in every trace."""
        answers = self.k if k is None else check_count("k", k)
        candidates = self.fetch_k if fetch_k is None else check_count("fetch_k", fetch_k)
        second_stage = _TracedReranker(self if self.compressor is None else self.compressor, {"callbacks": callbacks})
        if self.base_retriever is None:
            top_k = max(candidates or FETCH_K, answers)
            return TwoStageRetriever(self.first_stage, second_stage, top_k=top_k, top_n=answers)
        if filter is not None:
            raise InvalidInputError(
                "filter works with a first_stage; give a base_retriever its filter where you make it."
            )
        first_stage = _DocumentStage(self.base_retriever, {"callbacks": callbacks})
        top_k = ALL if candidates is None else max(candidates, answers)
        return TwoStageRetriever(first_stage, second_stage, top_k=top_k, top_n=answers)


class _TracedReranker(LazyReranker):
    """The second stage of one call, whose work is a run of its own."""

    def __init__(self, settings: RerankSettings, config: RunnableConfig) -> None:
        super().__init__(settings)
        self._config = config

    def rerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the candidates, most relevant first."""
        return self._run(top_n, instruction).invoke({"query": query, "documents": candidates}, self._config)

    async def arerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `rerank`, without blocking the event loop."""
        return await self._run(top_n, instruction).ainvoke({"query": query, "documents": candidates}, self._config)

    def _run(self, top_n: int | None, instruction: str | None) -> Runnable[dict[str, Any], list[RankedDocument]]:
        now, awaited = super().rerank, super().arerank

        def rerank(inputs: dict[str, Any]) -> list[RankedDocument]:
            return now(inputs["query"], inputs["documents"], top_n=top_n, instruction=instruction)

        async def arerank(inputs: dict[str, Any]) -> list[RankedDocument]:
            return await awaited(inputs["query"], inputs["documents"], top_n=top_n, instruction=instruction)

        return RunnableLambda(rerank, arerank, name="rerank")


@dataclass(frozen=True, slots=True)
class LangChainFirstStage:
    """A LangChain retriever as a first stage; made by `from_langchain`.

    Args:
        retriever: Finds the candidates.
        config: LangChain's configuration of every call, e.g. its callbacks.
    """

    retriever: RetrieverLike
    config: RunnableConfig | None = None

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return at most `top_k` candidates; fewer where the retriever is set to give fewer and takes no `k` in a call.

        Raises:
            InvalidInputError: If `filter` is given: LangChain has no common form for it.
        """
        text = check_search(query, top_k, filter, framework="LangChain")
        found = self.retriever.invoke(text, self.config, **_count_argument(self.retriever, top_k))
        return self._candidates(found[:top_k])

    async def asearch(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """As `search`, without blocking the event loop."""
        text = check_search(query, top_k, filter, framework="LangChain")
        found = await self.retriever.ainvoke(text, self.config, **_count_argument(self.retriever, top_k))
        return self._candidates(found[:top_k])

    def _candidates(self, documents: list[Document]) -> list[Candidate]:
        return _candidates(documents)


@dataclass(frozen=True, slots=True)
class _DocumentStage(LangChainFirstStage):
    """The first stage of one call, which keeps the documents that the retriever gave."""

    found: list[Document] = field(default_factory=list)

    def _candidates(self, documents: list[Document]) -> list[Candidate]:
        self.found.extend(documents)
        return _candidates(documents)


def from_langchain(retriever: RetrieverLike) -> LangChainFirstStage:
    """Return a LangChain retriever (Milvus, Qdrant, Elasticsearch, ...) as the first stage of this package.

    A document without an id gets a hash of its text as id; its score is looked for under `RETRIEVAL_SCORE_KEYS`.

    ```python
    first_stage = from_langchain(vector_store.as_retriever())
    search = TwoStageRetriever(first_stage, Reranker(QwenScorer()))
    hits = search.retrieve("query")
    ```
    """
    if not isinstance(retriever, Runnable):
        raise InvalidInputError(f"retriever must be a LangChain retriever, not a {type(retriever).__name__}.")
    return LangChainFirstStage(retriever)


def _read(inputs: Any) -> tuple[Sequence[Document], str]:
    """Return the step's documents and query, checked."""
    if not isinstance(inputs, Mapping) or not {"query", "documents"} <= set(inputs):
        raise InvalidInputError('the rerank step takes {"query": str, "documents": [...]}.')
    documents, query = inputs["documents"], check_query(inputs["query"])
    if isinstance(documents, str | bytes) or not isinstance(documents, Sequence):
        raise InvalidInputError(f"documents must be a list of LangChain documents, not {type(documents).__name__}.")
    for i, document in enumerate(documents):
        if not isinstance(document, Document):
            raise InvalidInputError(f"documents[{i}] must be a LangChain document, not {type(document).__name__}.")
    return documents, query


def _candidates(documents: Sequence[Document]) -> list[Candidate]:
    candidates = []
    for rank, document in enumerate(documents, start=1):
        text, metadata = document.page_content, document.metadata
        plain = PlainDocument(text_id(text) if document.id is None else document.id, text, metadata)
        candidates.append(Candidate(plain, _retrieval_score(metadata), rank))
    return candidates


def _answers(first_stage: FirstStage, hits: Sequence[RankedDocument]) -> list[Document]:
    """Return the result as LangChain's documents: copies of what a base retriever gave, else new ones."""
    if isinstance(first_stage, _DocumentStage):
        return [_scored(first_stage.found[hit.index], hit) for hit in hits]
    return [
        _scored(Document(hit.document.text, id=hit.document.id, metadata=dict(hit.document.metadata)), hit)
        for hit in hits
    ]


def _scored(document: Document, hit: RankedDocument) -> Document:
    """Return a copy of `document` with its scores."""
    metadata = copied(document.metadata)
    metadata.pop("rerank_error", None)
    if hit.first_stage_score is not None:
        metadata["retrieval_score"] = float(hit.first_stage_score)
    metadata["relevance_score"] = score_of(hit)
    if hit.error is not None:
        metadata["rerank_error"] = str(hit.error)
    return document.model_copy(update={"metadata": metadata})


def _retrieval_score(metadata: Mapping[Any, Any]) -> float | None:
    """Return the first finite number under one of the keys that retrievers use, or None."""
    for key in RETRIEVAL_SCORE_KEYS:
        value = metadata.get(key)
        number = value if isinstance(value, int) or not isinstance(value, Real) else float(value)  # numpy's, too
        if is_finite(number):
            return float(number)
    return None


def _count_argument(retriever: RetrieverLike, count: int) -> dict[str, int]:
    """Return `{"k": count}` for a retriever whose calls take it; the others would fail or ignore it."""
    if count == ALL or not isinstance(retriever, BaseRetriever):
        return {}
    parameters = inspect.signature(retriever._get_relevant_documents).parameters
    takes_k = "k" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"k": count} if takes_k else {}
