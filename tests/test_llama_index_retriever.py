"""The two-stage retriever for LlamaIndex, and LlamaIndex retrievers as first stages."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, TextNode

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.llama_index import BaseRetriever, QwenRerankPostprocessor, QwenRerankRetriever, from_llama_index
from qwen_rerank.pipeline import Cascade, TwoStageRetriever
from qwen_rerank.protocols import FirstStage
from qwen_rerank.reranker import Reranker
from qwen_rerank.testing import OverlapScorer, TableScorer
from qwen_rerank.types import Candidate, Document

QUERY = "red apple"
TEXTS = ["blue sky", "red apple", "red sky", "green apple tree"]


class Shelf:
    """A first stage that gives its texts in their order and remembers how many were asked for."""

    def __init__(self) -> None:
        self.asked = []

    def search(self, query, top_k, *, filter=None):
        self.asked.append(top_k)
        return [
            Candidate(Document(f"n{i}", text, {"n": i}), 1.0 - i / 10, i + 1) for i, text in enumerate(TEXTS[:top_k])
        ]


class AsyncShelf(Shelf):
    """A first stage that can only be waited for."""

    def search(self, query, top_k, *, filter=None):
        raise RuntimeError("this would block")

    async def asearch(self, query, top_k, *, filter=None):
        await asyncio.sleep(0)
        return Shelf().search(query, top_k)


@pytest.fixture
def base():
    nodes = [TextNode(id_=f"n{i}", text=text) for i, text in enumerate(TEXTS)]
    return VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4)).as_retriever(similarity_top_k=4)


def ids(found) -> list[str]:
    return [node.node_id for node in found]


def test_the_best_top_n_of_top_k_candidates_with_both_scores():
    shelf = Shelf()
    retriever = QwenRerankRetriever(
        first_stage=shelf, scorer=OverlapScorer(), top_n=1, top_k=3, keep_retrieval_score=True
    )

    [best] = retriever.retrieve(QUERY)

    assert (shelf.asked, best.node_id, best.metadata) == ([3], "n1", {"n": 1, "retrieval_score": 0.9})
    assert type(best.score) is float


def test_a_first_stage_document_is_scored_by_its_text_alone():
    table = TableScorer(dict.fromkeys(TEXTS, 0.0))

    found = QwenRerankRetriever(first_stage=Shelf(), scorer=table).retrieve(QUERY)

    assert ids(found) == ["n0", "n1", "n2", "n3"]
    assert found[0].node.get_content(MetadataMode.LLM) == "n: 0\n\nblue sky"


def test_a_llama_index_retriever_gives_the_candidates(base):
    assert ids(QwenRerankRetriever(base_retriever=base, scorer=OverlapScorer(), top_n=2).retrieve(QUERY)) == [
        "n1",
        "n2",
    ]
    assert len(QwenRerankRetriever(base_retriever=base, scorer=OverlapScorer(), top_k=2, top_n=1).retrieve(QUERY)) == 1


def test_there_are_never_fewer_candidates_than_answers():
    shelf = Shelf()
    QwenRerankRetriever(first_stage=shelf, scorer=OverlapScorer(), top_k=2).retrieve(QUERY)

    assert shelf.asked == [10]


async def test_async_gives_the_same_and_waits_for_an_async_first_stage(base):
    for stage in ({"first_stage": Shelf()}, {"base_retriever": base}):
        retriever = QwenRerankRetriever(**stage, scorer=OverlapScorer(), top_n=2)

        assert await retriever.aretrieve(QUERY) == retriever.retrieve(QUERY)
    waiting = QwenRerankRetriever(first_stage=AsyncShelf(), scorer=OverlapScorer(), top_n=2)
    assert ids(await waiting.aretrieve(QUERY)) == ["n1", "n2"]


def test_a_postprocessor_or_a_cascade_brings_its_own_top_n(base):
    cascade = Cascade([Reranker(OverlapScorer(), top_n=3), Reranker(OverlapScorer(), top_n=2)])
    postprocessor = QwenRerankPostprocessor(scorer=OverlapScorer(), top_n=3)

    assert len(QwenRerankRetriever(base_retriever=base, reranker=cascade).retrieve(QUERY)) == 2
    assert len(QwenRerankRetriever(base_retriever=base, postprocessor=postprocessor).retrieve(QUERY)) == 3


async def test_in_a_query_engine(base):
    retriever = QwenRerankRetriever(base_retriever=base, scorer=OverlapScorer(), top_n=1)
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())

    for response in (engine.query(QUERY), await engine.aquery(QUERY)):
        assert ids(response.source_nodes) == ["n1"]
        assert "red apple" in response.response


def test_in_the_retriever_evaluator(base):
    retriever = QwenRerankRetriever(base_retriever=base, scorer=OverlapScorer())
    evaluator = RetrieverEvaluator.from_metric_names(["mrr"], retriever=retriever)

    assert evaluator.evaluate(QUERY, expected_ids=["n2"]).metric_vals_dict == {"mrr": 0.5}


def test_callbacks_see_both_steps():
    debug = LlamaDebugHandler(print_trace_on_end=False)
    callbacks = CallbackManager([debug])

    QwenRerankRetriever(first_stage=Shelf(), scorer=OverlapScorer(), callback_manager=callbacks).retrieve(QUERY)

    assert [len(debug.get_event_pairs(kind)) for kind in (CBEventType.RETRIEVE, CBEventType.RERANKING)] == [1, 1]


async def test_any_llama_index_retriever_is_a_first_stage_in_three_lines(base):
    first_stage = from_llama_index(base)
    search = TwoStageRetriever(first_stage, Reranker(OverlapScorer()), top_k=4, top_n=2)
    hits = search.retrieve(QUERY)

    assert isinstance(first_stage, FirstStage)
    assert (
        [hit.document.id for hit in hits] == [hit.document.id for hit in await search.aretrieve(QUERY)] == ["n1", "n2"]
    )
    assert [candidate.rank for candidate in first_stage.search(QUERY, 3)] == [1, 2, 3]


def test_a_first_stage_made_of_a_retriever_refuses_filters_and_images():
    class Images(BaseRetriever):
        def _retrieve(self, query_bundle):
            return [NodeWithScore(node=ImageNode(image_url="http://x/a.png"))]

    with pytest.raises(InvalidInputError, match="filter must be None"):
        from_llama_index(Images()).search(QUERY, 2, filter={"lang": "en"})
    with pytest.raises(InvalidInputError, match=r"nodes\[0\] is a ImageNode without text"):
        from_llama_index(Images()).search(QUERY, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({}, "either first_stage or base_retriever", id="no first stage"),
        pytest.param({"first_stage": OverlapScorer()}, "must have a search method", id="no first stage either"),
        pytest.param({"base_retriever": Shelf()}, "goes into first_stage", id="a first stage as retriever"),
        pytest.param({"first_stage": Shelf(), "top_n": 0}, "top_n must be an integer of at least 1", id="no answers"),
        pytest.param({"first_stage": Shelf(), "top_k": True}, "top_k must be an integer", id="a boolean"),
        pytest.param(
            {"first_stage": Shelf(), "postprocessor": QwenRerankPostprocessor(), "top_n": 5},
            "postprocessor brings its own top_n",
            id="a setting of the postprocessor",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        QwenRerankRetriever(**settings)


def test_a_thing_that_is_no_retriever_is_refused():
    with pytest.raises(InvalidInputError, match="must be a LlamaIndex retriever, not a Shelf"):
        from_llama_index(Shelf())
