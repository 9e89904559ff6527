"""The node postprocessor: scores, copies, events, and LlamaIndex's own query engine and evaluator."""

from __future__ import annotations

import asyncio
import copy

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)

from qwen_rerank.errors import DocumentScoringError, InvalidInputError
from qwen_rerank.llama_index import QwenRerankPostprocessor
from qwen_rerank.reranker import Reranker
from qwen_rerank.testing import OverlapScorer, TableScorer

QUERY = "red apple"
TEXTS = ["blue sky", "red apple", "red sky", "green apple tree"]


def nodes(**settings) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=f"n{i}", text=text, **copy.deepcopy(settings)), score=0.5 - i / 10)
        for i, text in enumerate(TEXTS)
    ]


def postprocessor(**settings) -> QwenRerankPostprocessor:
    return QwenRerankPostprocessor(scorer=OverlapScorer(), **settings)


def ids(found) -> list[str]:
    return [node.node_id for node in found]


class Events(BaseEventHandler):
    """Remembers the rerank events."""

    seen: list = []

    def handle(self, event, **kwargs):
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.seen.append(event)

    def names(self) -> list[str]:
        return [event.class_name() for event in self.seen]


@pytest.fixture
def events():
    handler, root = Events(seen=[]), get_dispatcher()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


def test_the_best_nodes_come_first_and_ties_keep_the_first_stage_order():
    assert isinstance(postprocessor(), BaseNodePostprocessor)
    assert ids(postprocessor(top_n=None).postprocess_nodes(nodes(), query_str=QUERY)) == ["n1", "n2", "n3", "n0"]
    assert ids(postprocessor().postprocess_nodes(nodes(), QueryBundle(QUERY))) == ["n1", "n2", "n3"]


def test_scores_are_python_floats():
    found = postprocessor(top_n=None, keep_retrieval_score=True).postprocess_nodes(nodes(), query_str=QUERY)

    assert {type(node.score) for node in found} == {float}
    assert {type(node.metadata["retrieval_score"]) for node in found} == {float}


def test_a_negative_or_zero_log_odds_is_sorted_by_its_value():
    table = TableScorer(dict(zip(TEXTS, [0.0, -5.0, 5.0, -1.0], strict=True)))

    assert ids(QwenRerankPostprocessor(scorer=table, top_n=4).postprocess_nodes(nodes(), query_str=QUERY)) == [
        "n2",
        "n0",
        "n3",
        "n1",
    ]


def test_inputs_stay_untouched_even_when_an_answer_is_changed():
    given = nodes(metadata={"tags": ["a"]}, embedding=[1.0, 2.0])
    before = copy.deepcopy(given)

    for answer in postprocessor(top_n=None, keep_retrieval_score=True).postprocess_nodes(given, query_str=QUERY):
        answer.node.metadata["tags"].append("changed")
        answer.node.embedding.append(3.0)
        answer.node.excluded_llm_metadata_keys.append("changed")

    assert given == before


def test_the_text_scored_is_the_embed_text():
    table = TableScorer({"topic: fruit\n\nred apple": 1.0})
    node = TextNode(text="red apple", metadata={"topic": "fruit", "secret": 1}, excluded_embed_metadata_keys=["secret"])

    assert (
        len(QwenRerankPostprocessor(scorer=table).postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)) == 1
    )


def test_the_retrieval_score_is_kept_without_leaking_into_any_text():
    found = postprocessor(keep_retrieval_score=True).postprocess_nodes(nodes(metadata={"a": 1}), query_str=QUERY)
    again = postprocessor(keep_retrieval_score=True).postprocess_nodes(found, query_str=QUERY)

    for best in (found[0], again[0]):
        assert best.metadata["retrieval_score"] == pytest.approx(0.4)
        for mode in (MetadataMode.EMBED, MetadataMode.LLM):
            assert best.node.get_content(mode) == "a: 1\n\nred apple"


def test_the_retrieval_score_is_dropped_by_default_and_where_there_was_none():
    unscored = [NodeWithScore(node=node.node) for node in nodes()]

    assert postprocessor().postprocess_nodes(nodes(), query_str=QUERY)[0].metadata == {}
    assert postprocessor(keep_retrieval_score=True).postprocess_nodes(unscored, query_str=QUERY)[0].metadata == {}


def test_duplicates_are_kept_with_the_same_score():
    found = postprocessor().postprocess_nodes([nodes()[1]] * 2, query_str=QUERY)

    assert ids(found) == ["n1", "n1"]
    assert found[0].score == found[1].score


def test_the_object_of_an_index_node_is_shared_not_copied():
    thing = object()
    node = IndexNode(text="red apple", index_id="i", obj=thing)

    assert postprocessor().postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)[0].node.obj is thing


@pytest.mark.parametrize(
    "node", [ImageNode(image_url="http://x/a.png"), Node(image_resource=MediaResource(data=b"png"), metadata={"a": 1})]
)
def test_an_image_without_text_is_refused_by_name(node, events):
    with pytest.raises(InvalidInputError, match=rf"nodes\[1\] is a {type(node).__name__} without text.*caption"):
        postprocessor().postprocess_nodes([nodes()[0], NodeWithScore(node=node)], query_str=QUERY)

    assert events.seen == []


def test_an_image_with_text_and_an_empty_text_are_scored():
    given = [
        NodeWithScore(node=TextNode(text="")),
        NodeWithScore(node=ImageNode(text="red apple", image_url="http://x/a.png")),
        NodeWithScore(node=Document(text="red")),
    ]

    found = postprocessor().postprocess_nodes(given, query_str=QUERY)

    assert [type(node.node) for node in found] == [ImageNode, Document, TextNode]


def test_threshold_and_top_n():
    assert ids(postprocessor(threshold=0.9).postprocess_nodes(nodes(), query_str=QUERY)) == ["n1"]
    assert ids(postprocessor(top_n=2).postprocess_nodes(nodes(), query_str=QUERY)) == ["n1", "n2"]
    assert QwenRerankPostprocessor(reranker=Reranker(OverlapScorer(), top_n=2)).top_n == 2


def test_a_node_that_fails_comes_last_with_no_score_and_the_reason_hidden_from_the_llm():
    reranker = Reranker(TableScorer({TEXTS[1]: 1.0}), on_error="last")

    found = QwenRerankPostprocessor(reranker=reranker, top_n=2).postprocess_nodes(nodes(), query_str=QUERY)

    assert (ids(found), found[1].score) == (["n1", "n0"], None)
    assert "not in the table" in found[1].metadata["rerank_error"]
    assert found[1].node.get_content(MetadataMode.LLM) == "blue sky"


async def test_async_gives_the_same_and_many_calls_wait_side_by_side():
    class Meeting(OverlapScorer):
        """Answers only when two calls are in it at once."""

        def __init__(self):
            super().__init__()
            self.both = asyncio.Barrier(2)

        async def ascore(self, query, documents, *, instruction=None):
            await asyncio.wait_for(self.both.wait(), 60)
            return self.score(query, documents, instruction=instruction)

    reranks = QwenRerankPostprocessor(scorer=Meeting())
    calls = [reranks.apostprocess_nodes(nodes(), query_str=QUERY) for _ in range(2)]

    assert await asyncio.gather(*calls) == [postprocessor().postprocess_nodes(nodes(), query_str=QUERY)] * 2


async def test_every_rerank_is_one_pair_of_events_sync_and_async(events):
    postprocessor(top_n=None).postprocess_nodes(nodes(), query_str=QUERY)
    await postprocessor(top_n=2).apostprocess_nodes(nodes(), query_str=QUERY)

    assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"] * 2
    assert [(e.query, e.top_n, e.model_name, len(e.nodes)) for e in events.seen[::2]] == [
        (QUERY, 4, "overlap", 4),
        (QUERY, 2, "overlap", 4),
    ]
    assert [ids(e.nodes) for e in events.seen[1::2]] == [["n1", "n2", "n3", "n0"], ["n1", "n2"]]


async def test_an_error_ends_its_events_too(events):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    failing = QwenRerankPostprocessor(scorer=TableScorer({}), callback_manager=CallbackManager([debug]))

    with pytest.raises(DocumentScoringError):
        failing.postprocess_nodes(nodes(), query_str=QUERY)
    with pytest.raises(DocumentScoringError):
        await failing.apostprocess_nodes(nodes(), query_str=QUERY)

    assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"] * 2
    pairs = debug.get_event_pairs(CBEventType.RERANKING)
    assert [EventPayload.EXCEPTION in end.payload for _, end in pairs] == [True, True]


@pytest.mark.parametrize(
    ("query", "message"),
    [pytest.param(None, "query_bundle is missing", id="no query"), pytest.param(" ", "query is empty", id="blank")],
)
async def test_without_a_query_there_is_a_value_error_and_no_event(events, query, message):
    with pytest.raises(ValueError, match=message):
        postprocessor().postprocess_nodes(nodes(), query_str=query)
    with pytest.raises(ValueError, match=message):
        await postprocessor().apostprocess_nodes(nodes(), query_str=query)

    assert events.seen == []


async def test_no_nodes_give_none_without_asking_the_scorer(events):
    scorer = TableScorer({})
    reranks = QwenRerankPostprocessor(scorer=scorer)

    assert reranks.postprocess_nodes([], query_str=QUERY) == await reranks.apostprocess_nodes([], query_str=QUERY) == []
    assert (scorer.calls, events.seen) == ([], [])


def test_the_older_callback_reports_the_step():
    debug = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor(top_n=1, callback_manager=CallbackManager([debug])).postprocess_nodes(nodes(), query_str=QUERY)

    [(start, end)] = debug.get_event_pairs(CBEventType.RERANKING)
    assert (start.payload[EventPayload.QUERY_STR], start.payload[EventPayload.TOP_K]) == (QUERY, 1)
    assert start.payload[EventPayload.MODEL_NAME] == "overlap"
    assert ids(end.payload[EventPayload.NODES]) == ["n1"]


async def test_a_callback_that_raises_surfaces_and_still_ends_the_events(events):
    class Broken(LlamaDebugHandler):
        def on_event_start(self, *args, **kwargs):
            raise OSError("broken handler")

    broken = postprocessor(callback_manager=CallbackManager([Broken()]))
    with pytest.raises(OSError, match="broken handler"):
        broken.postprocess_nodes(nodes(), query_str=QUERY)
    with pytest.raises(OSError, match="broken handler"):
        await broken.apostprocess_nodes(nodes(), query_str=QUERY)

    assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"] * 2


async def test_both_ways_have_a_span():
    spans, root = SimpleSpanHandler(), get_dispatcher()
    root.add_span_handler(spans)
    try:
        postprocessor().postprocess_nodes(nodes(), query_str=QUERY)
        await postprocessor().apostprocess_nodes(nodes(), query_str=QUERY)
    finally:
        root.span_handlers.remove(spans)

    names = [span.id_.partition("-")[0] for span in spans.completed_spans]
    assert names == ["QwenRerankPostprocessor._postprocess_nodes", "QwenRerankPostprocessor._apostprocess_nodes"]


@pytest.fixture
def index() -> VectorStoreIndex:
    return VectorStoreIndex([node.node for node in nodes()], embed_model=MockEmbedding(embed_dim=4))


async def test_in_a_query_engine(index, events):
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=4, node_postprocessors=[postprocessor(top_n=1, keep_retrieval_score=True)]
    )

    for response in (engine.query(QUERY), await engine.aquery(QUERY)):
        assert ids(response.source_nodes) == ["n1"]
        assert "red apple" in response.response
        assert "retrieval_score" not in response.response
    assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"] * 2


def test_in_a_query_engine_put_together_by_hand(index):
    engine = RetrieverQueryEngine(
        retriever=index.as_retriever(similarity_top_k=4),
        response_synthesizer=get_response_synthesizer(llm=MockLLM()),
        node_postprocessors=[postprocessor(top_n=2)],
    )

    assert ids(engine.query(QUERY).source_nodes) == ["n1", "n2"]


def test_in_the_retriever_evaluator(index):
    evaluator = RetrieverEvaluator.from_metric_names(
        ["mrr", "hit_rate"],
        retriever=index.as_retriever(similarity_top_k=4),
        node_postprocessors=[postprocessor(top_n=1)],
    )

    result = evaluator.evaluate(QUERY, expected_ids=["n1"])

    assert (result.retrieved_ids, result.metric_vals_dict) == (["n1"], {"mrr": 1.0, "hit_rate": 1.0})
