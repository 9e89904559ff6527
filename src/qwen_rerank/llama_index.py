"""LlamaIndex: a node postprocessor, a two-stage retriever, and any LlamaIndex retriever as a first stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from qwen_rerank.errors import InvalidInputError, MissingExtraError

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, Node, NodeWithScore, QueryBundle, TextNode
except ImportError as exc:
    raise MissingExtraError(
        "qwen_rerank.llama_index", package="llama-index-core", extra="llama-index", cause=exc
    ) from exc

from pydantic import ConfigDict, Field, model_validator

from qwen_rerank.adapters import (
    ALL,
    LazyReranker,
    TopNSettings,
    check_search,
    check_stages,
    copied,
    own_top_n,
    score_of,
)
from qwen_rerank.checks import check_count, check_query
from qwen_rerank.llama_index_store import QwenVectorStore
from qwen_rerank.pipeline import TwoStageRetriever
from qwen_rerank.protocols import FirstStage
from qwen_rerank.types import Candidate, Document, RankedDocument

__all__ = [
    "LlamaIndexFirstStage",
    "QwenRerankPostprocessor",
    "QwenRerankRetriever",
    "QwenVectorStore",
    "from_llama_index",
]

TOP_K = 100  # candidates of a first stage that is asked for no other number
TOP_N = 10
_dispatcher = get_dispatcher(__name__)


class QwenRerankPostprocessor(TopNSettings, BaseNodePostprocessor):
    """Reranks nodes and keeps the best; one of a query engine's `node_postprocessors`.

    Give a model name, or a `scorer`, or a `reranker`; with none of them the model is Qwen/Qwen3-Reranker-0.6B. A model
    named here is what `load_scorer` finds under the name, and loads on first use. What is scored is a node's `MetadataMode.EMBED` text. Returned nodes are copies with
    the score in [0, 1]; a node that a reranker with `on_error="last"` could not score has score None and the reason in
    `metadata["rerank_error"]`, hidden from embeddings and LLM.

    `to_dict` describes a `QwenScorer`, `CrossEncoderScorer` or `HttpScorer` by class and configuration, without keys,
    and `from_dict` rebuilds it, loading nothing before first use; JSON and pickle do the same. Any other scorer is
    named, and `from_dict` asks for it: `from_dict(data, scorer=...)`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    keep_retrieval_score: bool = Field(
        default=False,
        description="Whether metadata['retrieval_score'] keeps the first stage's score, hidden from embeddings and LLM.",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, data: Any) -> Any:
        """Let the `class_name` that LlamaIndex writes into every dump come back in."""
        return {k: v for k, v in data.items() if k != "class_name"} if isinstance(data, Mapping) else data

    @classmethod
    def class_name(cls) -> str:
        """Return the name that serialised forms carry."""
        return "QwenRerankPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        return self._rank(query, nodes, _candidates(nodes), self.top_n)[1]

    @_dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        return (await self._arank(query, nodes, _candidates(nodes), self.top_n))[1]

    def _rank(
        self, query: str, nodes: list[NodeWithScore], candidates: Sequence[Candidate], top_n: int | None
    ) -> tuple[list[RankedDocument], list[NodeWithScore]]:
        """Return the result, and the same as copies of the nodes that the candidates were made from."""
        if not candidates:
            return [], []
        with self._reported(query, nodes, top_n) as answers:
            hits = LazyReranker(self).rerank(query, candidates, top_n=ALL if top_n is None else top_n)
            answers += self._answers(nodes, hits)
        return hits, answers

    async def _arank(
        self, query: str, nodes: list[NodeWithScore], candidates: Sequence[Candidate], top_n: int | None
    ) -> tuple[list[RankedDocument], list[NodeWithScore]]:
        if not candidates:
            return [], []
        with self._reported(query, nodes, top_n) as answers:
            hits = await LazyReranker(self).arerank(query, candidates, top_n=ALL if top_n is None else top_n)
            answers += self._answers(nodes, hits)
        return hits, answers

    @contextmanager
    def _reported(self, query: str, nodes: list[NodeWithScore], top_n: int | None) -> Iterator[list[NodeWithScore]]:
        """Report the step to both of LlamaIndex's event systems; every start gets its end, after errors too."""
        top_n = len(nodes) if top_n in (None, ALL) else top_n  # the event wants a number
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.scorer_name,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: top_n,
        }
        answers: list[NodeWithScore] = []
        _dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=self.scorer_name))
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield answers
                event.on_end(payload={EventPayload.NODES: answers})
        finally:
            _dispatcher.event(ReRankEndEvent(nodes=answers))

    def _answers(self, nodes: Sequence[NodeWithScore], hits: Sequence[RankedDocument]) -> list[NodeWithScore]:
        return [_scored(nodes[hit.index], hit, keep=self.keep_retrieval_score) for hit in hits]


class QwenRerankRetriever(BaseRetriever):
    """Two stages behind one retriever: candidates from the first stage, the best `top_n` of them as answers.

    Args:
        first_stage: A first stage of this package (`FaissStore`, `BM25Index`, ...), or
        base_retriever: any LlamaIndex retriever.
        postprocessor: The second stage with all its settings, `top_n` among them; or
        model: a name that `load_scorer` knows, or
        scorer: a scorer, or
        reranker: a `Reranker` or `Cascade`. With none of them, Qwen/Qwen3-Reranker-0.6B.
        top_n: Answers; 10 by default, or what a given reranker says. Belongs to the postprocessor where one is given.
        top_k: Candidates, never fewer than `top_n`. None: 100 of a `first_stage`, or what the `base_retriever` gives;
            a `base_retriever` has its own `similarity_top_k` and is cut to `top_k`.
        threshold: Least score of an answer, in [0, 1].
        instruction: What relevance means; None for the scorer's default.
        keep_retrieval_score: Whether `metadata["retrieval_score"]` keeps the first stage's score.
        callback_manager: LlamaIndex's callbacks.
        verbose: LlamaIndex's switch for printing.
    """

    def __init__(
        self,
        *,
        first_stage: FirstStage | None = None,
        base_retriever: BaseRetriever | None = None,
        postprocessor: QwenRerankPostprocessor | None = None,
        model: str | None = None,
        scorer: Any = None,
        reranker: Any = None,
        top_n: int | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        instruction: str | None = None,
        keep_retrieval_score: bool = False,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        settings = {
            "model": model,
            "scorer": scorer,
            "reranker": reranker,
            "top_n": top_n,
            "threshold": threshold,
            "instruction": instruction,
            "keep_retrieval_score": keep_retrieval_score or None,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        check_stages(first_stage, base_retriever, framework="LlamaIndex", retriever=BaseRetriever)
        self._first_stage: Any = first_stage
        self._base_retriever = base_retriever
        self._postprocessor = _second_stage(postprocessor, given, callback_manager)
        self._top_k = None if top_k is None else check_count("top_k", top_k)
        super().__init__(callback_manager=callback_manager, verbose=verbose)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        line, second_stage = self._line(query_bundle)
        line.retrieve(query_bundle.query_str)
        return second_stage.answers

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        line, second_stage = self._line(query_bundle)
        await line.aretrieve(query_bundle.query_str)
        return second_stage.answers

    def _line(self, query_bundle: QueryBundle) -> tuple[TwoStageRetriever, _NodeReranker]:
        """Return the two stages of one call, and the second one by itself."""
        answers, candidates = self._postprocessor.top_n, self._top_k
        if self._base_retriever is None:
            second_stage = _NodeReranker(self._postprocessor)
            first_stage, top_k = self._first_stage, max(candidates or TOP_K, answers or 1)
        else:
            first_stage = _NodeStage(self._base_retriever, query_bundle)
            second_stage = _NodeReranker(self._postprocessor, first_stage.found)
            top_k = ALL if candidates is None else max(candidates, answers or 1)
        return TwoStageRetriever(first_stage, second_stage, top_k=top_k, top_n=answers or ALL), second_stage


class _NodeReranker(LazyReranker):
    """The second stage of one call, which reports itself as the postprocessor does and makes nodes of its result.

    Args:
        postprocessor: Its settings.
        found: The candidates as nodes; None where the first stage gives documents of this package.

    Attributes:
        answers: The result.
    """

    def __init__(self, postprocessor: QwenRerankPostprocessor, found: list[NodeWithScore] | None = None) -> None:
        super().__init__(postprocessor)
        self.answers: list[NodeWithScore] = []
        self._postprocessor = postprocessor
        self._found = found

    @_dispatcher.span
    def rerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the candidates, most relevant first."""
        hits, self.answers = self._postprocessor._rank(query, self._nodes(candidates), candidates, top_n)
        return hits

    @_dispatcher.span
    async def arerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `rerank`, without blocking the event loop."""
        hits, self.answers = await self._postprocessor._arank(query, self._nodes(candidates), candidates, top_n)
        return hits

    def _nodes(self, candidates: Sequence[Candidate]) -> list[NodeWithScore]:
        return [_from_candidate(found) for found in candidates] if self._found is None else self._found


@dataclass(frozen=True, slots=True)
class LlamaIndexFirstStage:
    """A LlamaIndex retriever as a first stage; made by `from_llama_index`."""

    retriever: BaseRetriever

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return at most `top_k` candidates; fewer where the retriever's own `similarity_top_k` is smaller.

        Raises:
            InvalidInputError: If `filter` is given (LlamaIndex takes it where the retriever is made), or a node has no
                text.
        """
        text = check_search(query, top_k, filter, framework="LlamaIndex")
        return self._candidates(self.retriever.retrieve(self._asked(text))[:top_k])

    async def asearch(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """As `search`, without blocking the event loop."""
        text = check_search(query, top_k, filter, framework="LlamaIndex")
        return self._candidates((await self.retriever.aretrieve(self._asked(text)))[:top_k])

    def _asked(self, query: str) -> str | QueryBundle:
        return query

    def _candidates(self, nodes: list[NodeWithScore]) -> list[Candidate]:
        return _candidates(nodes)


@dataclass(frozen=True, slots=True)
class _NodeStage(LlamaIndexFirstStage):
    """The first stage of one call, which asks with the whole query bundle and keeps the nodes that the retriever gave."""

    query_bundle: QueryBundle
    found: list[NodeWithScore] = field(default_factory=list)

    def _asked(self, query: str) -> QueryBundle:
        return self.query_bundle

    def _candidates(self, nodes: list[NodeWithScore]) -> list[Candidate]:
        self.found.extend(nodes)
        return _candidates(nodes)


def from_llama_index(retriever: BaseRetriever) -> LlamaIndexFirstStage:
    """Return a LlamaIndex retriever (Milvus, Qdrant, Elasticsearch, ...) as the first stage of this package.

    ```python
    first_stage = from_llama_index(index.as_retriever(similarity_top_k=100))
    search = TwoStageRetriever(first_stage, Reranker(QwenScorer()))
    hits = search.retrieve("query")
    ```
    """
    if not isinstance(retriever, BaseRetriever):
        raise InvalidInputError(f"retriever must be a LlamaIndex retriever, not a {type(retriever).__name__}.")
    return LlamaIndexFirstStage(retriever)


def _second_stage(
    postprocessor: QwenRerankPostprocessor | None, given: dict[str, Any], callback_manager: CallbackManager | None
) -> QwenRerankPostprocessor:
    if postprocessor is not None and given:
        raise InvalidInputError(
            f"postprocessor brings its own {next(iter(given))}; give it to the postprocessor instead."
        )
    if postprocessor is not None:
        return postprocessor
    settings = dict(given)
    settings.setdefault("top_n", own_top_n(given.get("reranker"), TOP_N))
    if callback_manager is not None:
        settings["callback_manager"] = callback_manager
    return QwenRerankPostprocessor(**settings)


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise InvalidInputError("query_bundle is missing; give query_bundle=QueryBundle(...) or query_str='...'.")
    return check_query(query_bundle.query_str)


def _candidates(nodes: Sequence[NodeWithScore]) -> list[Candidate]:
    return [_to_candidate(node, index) for index, node in enumerate(nodes)]


def _to_candidate(scored: NodeWithScore, index: int) -> Candidate:
    node = scored.node
    if _is_textless(node):
        raise InvalidInputError(
            f"nodes[{index}] is a {type(node).__name__} without text ({node.node_id}), which a text reranker cannot "
            "read; give it a caption as text, or filter such nodes out first."
        )
    score = None if scored.score is None else float(scored.score)
    return Candidate(Document(node.node_id, node.get_content(MetadataMode.EMBED), node.metadata), score, index + 1)


def _is_textless(node: BaseNode) -> bool:
    """Return whether a node is something else than text and nothing is written on it."""
    media = ("image_resource", "audio_resource", "video_resource")
    other = isinstance(node, ImageNode) or (isinstance(node, Node) and any(getattr(node, name) for name in media))
    return other and not node.get_content(MetadataMode.NONE).strip()


def _scored(scored: NodeWithScore, hit: RankedDocument, *, keep: bool) -> NodeWithScore:
    """Return a copy with the new score; what is added to the metadata is hidden from embeddings and LLM."""
    node = _copied_node(scored.node)
    node.metadata.pop("rerank_error", None)
    if hit.error is not None:
        _note(node, "rerank_error", str(hit.error))
    if keep and hit.first_stage_score is not None:
        # After an earlier rerank the node's score is that rerank's; the first stage's is already there.
        _note(node, "retrieval_score", node.metadata.get("retrieval_score", hit.first_stage_score))
    return NodeWithScore(node=node, score=score_of(hit))


def _note(node: BaseNode, key: str, value: Any) -> None:
    node.metadata[key] = value
    for excluded in (node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys):
        if key not in excluded:
            excluded.append(key)


def _copied_node(node: BaseNode) -> BaseNode:
    """Return a copy that shares nothing but an index node's `obj`, which is a reference by its nature."""
    values = {name: value for name, value in node if name not in ("metadata", "obj")}
    return node.model_copy(update={**copied(values), "metadata": copied(node.metadata)})


def _from_candidate(candidate: Candidate) -> NodeWithScore:
    """Return a first stage's document as a node whose scored text is the document's text alone."""
    document = candidate.document
    metadata = copied(document.metadata)
    node = TextNode(id_=document.id, text=document.text, metadata=metadata, excluded_embed_metadata_keys=list(metadata))
    return NodeWithScore(node=node, score=None if candidate.score is None else float(candidate.score))
