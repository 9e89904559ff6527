"""The document compressor, on documents made by hand and in LangChain's own wrappers."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import numpy as np
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.load import dumps
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore

from qwen_rerank.errors import DocumentScoringError, InvalidInputError
from qwen_rerank.langchain import QwenRerankCompressor
from qwen_rerank.reranker import Reranker
from qwen_rerank.testing import OverlapScorer, TableScorer
from tests.tracing import Runs

QUERY = "red apple"
TEXTS = ["blue sky", "red apple", "red sky", "green apple tree"]


def documents(**metadata) -> list[Document]:
    return [Document(text, id=f"d{i}", metadata={"n": i, **metadata}) for i, text in enumerate(TEXTS)]


def compressor(**settings) -> QwenRerankCompressor:
    return QwenRerankCompressor(scorer=OverlapScorer(), **settings)


def texts(found) -> list[str]:
    return [document.page_content for document in found]


class Listed(BaseRetriever):
    """Gives the same documents to every query."""

    found: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.found


def test_the_best_documents_come_first_and_ties_keep_the_first_stage_order():
    found = compressor(top_n=None).compress_documents(documents(), QUERY)

    assert texts(found) == ["red apple", "red sky", "green apple tree", "blue sky"]


def test_three_documents_by_default():
    assert isinstance(compressor(), BaseDocumentCompressor)
    assert len(compressor().compress_documents(documents(), QUERY)) == 3


def test_no_documents_give_none_without_asking_the_scorer():
    scorer = TableScorer({})

    assert QwenRerankCompressor(scorer=scorer).compress_documents([], QUERY) == []
    assert scorer.calls == []


def test_id_and_metadata_stay_and_the_score_is_a_float_between_0_and_1():
    best = compressor().compress_documents(documents(), QUERY)[0]

    assert (best.id, best.metadata["n"]) == ("d1", 1)
    assert type(best.metadata["relevance_score"]) is float
    assert best.metadata["relevance_score"] == pytest.approx(1 / (1 + np.exp(-4.0)))


def test_inputs_stay_untouched_even_when_an_answer_is_changed():
    given = documents(nested={"tags": ["a"]})
    before = copy.deepcopy(given)

    for answer in compressor(top_n=None).compress_documents(given, QUERY):
        answer.metadata["nested"]["tags"].append("changed")

    assert given == before


def test_metadata_that_cannot_be_copied_is_shared():
    lock = threading.Lock()

    assert compressor().compress_documents(documents(lock=lock), QUERY)[0].metadata["lock"] is lock


def test_a_document_of_another_class_keeps_its_class_and_fields():
    class Page(Document):
        page: int = 7

    answer = compressor().compress_documents([Page("red apple", page=8)], QUERY)[0]

    assert (type(answer), answer.page) == (Page, 8)


@pytest.mark.parametrize("key", ["retrieval_score", "score", "_score", "similarity_score", "@search.score"])
def test_the_first_stage_score_is_kept_as_retrieval_score(key):
    answer = compressor().compress_documents(documents(**{key: np.float32(0.5)}), QUERY)[0]

    assert answer.metadata["retrieval_score"] == 0.5
    assert type(answer.metadata["retrieval_score"]) is float


@pytest.mark.parametrize("value", ["0.5", True, float("nan"), None, [0.5], 10**400])
def test_what_is_no_number_is_no_retrieval_score(value):
    answer = compressor().compress_documents(documents(score=value), QUERY)[0]

    assert "retrieval_score" not in answer.metadata


def test_a_top_n_set_later_is_a_count_or_none():
    later = compressor()
    later.top_n = 0
    with pytest.raises(InvalidInputError, match="top_n must be an integer of at least 1, not 0"):
        later.compress_documents(documents(), QUERY)


def test_a_second_rerank_wins_and_the_first_ones_score_is_no_retrieval_score():
    once = compressor(top_n=None).compress_documents(documents(), QUERY)
    table = TableScorer(dict(zip(TEXTS, [2.0, -1.0, 0.0, -2.0], strict=True)))

    twice = QwenRerankCompressor(scorer=table).compress_documents(once, QUERY)

    assert texts(twice) == ["blue sky", "red sky", "red apple"]
    assert twice[0].metadata["relevance_score"] == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert "retrieval_score" not in twice[0].metadata


def test_the_first_stage_score_survives_two_reranks():
    once = compressor().compress_documents(documents(score=0.25), QUERY)

    assert compressor().compress_documents(once, QUERY)[0].metadata["retrieval_score"] == 0.25


def test_empty_texts_and_lc_keys_pass_as_data():
    trap = {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "Document"], "kwargs": {}}
    given = [Document("", metadata={"lc": 1, "payload": trap}), Document("red apple", metadata=trap)]

    answers = compressor(top_n=None).compress_documents(given, QUERY)

    assert texts(answers) == ["red apple", ""]
    assert answers[0].metadata.items() >= trap.items()
    assert answers[1].metadata["payload"] == trap


def test_duplicates_are_kept_with_the_same_score():
    answers = compressor().compress_documents([Document("red apple", id="x")] * 2, QUERY)

    assert [a.id for a in answers] == ["x", "x"]
    assert answers[0].metadata["relevance_score"] == answers[1].metadata["relevance_score"]


def test_the_threshold_drops_what_is_below_it_and_may_be_changed():
    reranks = compressor(top_n=None, threshold=0.9)
    assert texts(reranks.compress_documents(documents(), QUERY)) == ["red apple"]

    reranks.threshold = 0.4
    assert len(reranks.compress_documents(documents(), QUERY)) == 3


def test_the_instruction_reaches_the_scorer():
    scorer = TableScorer(dict.fromkeys(TEXTS, 0.0))

    QwenRerankCompressor(scorer=scorer, instruction="Find fruit").compress_documents(documents(), QUERY)

    assert scorer.calls[0][2] == "Find fruit"


def test_a_rerankers_own_top_n_counts_unless_another_is_given():
    two = Reranker(OverlapScorer(), top_n=2)

    assert QwenRerankCompressor(reranker=two).top_n == 2
    assert QwenRerankCompressor(reranker=two, top_n=4).top_n == 4
    assert len(QwenRerankCompressor(reranker=Reranker(OverlapScorer())).compress_documents(documents(), QUERY)) == 3


def test_a_document_that_fails_is_an_error_or_comes_last_without_a_score():
    half = TableScorer({TEXTS[0]: 1.0})
    given = documents(relevance_score=0.9)

    with pytest.raises(DocumentScoringError, match="3 of 4 documents"):
        QwenRerankCompressor(scorer=half).compress_documents(given, QUERY)
    answers = QwenRerankCompressor(reranker=Reranker(half, on_error="last")).compress_documents(given, QUERY)

    assert [a.metadata["relevance_score"] is None for a in answers] == [False, True, True]
    assert "not in the table" in answers[1].metadata["rerank_error"]


async def test_async_gives_the_same_and_many_calls_wait_side_by_side():
    class Meeting(OverlapScorer):
        """Answers only when two calls are in it at once."""

        def __init__(self):
            super().__init__()
            self.both = asyncio.Barrier(2)

        async def ascore(self, query, documents, *, instruction=None):
            await asyncio.wait_for(self.both.wait(), 60)
            return self.score(query, documents, instruction=instruction)

    reranks = QwenRerankCompressor(scorer=Meeting())
    first, second = await asyncio.gather(*[reranks.acompress_documents(documents(), QUERY) for _ in range(2)])

    assert first == second == compressor().compress_documents(documents(), QUERY)


def test_in_a_compression_retriever_the_rerank_step_is_a_run_of_its_own():
    runs = Runs()
    retriever = ContextualCompressionRetriever(
        base_retriever=Listed(found=documents()), base_compressor=compressor(top_n=1)
    )

    assert texts(retriever.invoke(QUERY, config={"callbacks": [runs]})) == ["red apple"]
    assert runs.tree() == {"ContextualCompressionRetriever": {"Listed": {}, "rerank": {}}}


async def test_in_an_async_compression_retriever_too():
    runs = Runs()
    retriever = ContextualCompressionRetriever(
        base_retriever=Listed(found=documents()), base_compressor=compressor(top_n=1)
    )

    assert texts(await retriever.ainvoke(QUERY, config={"callbacks": [runs]})) == ["red apple"]
    assert runs.tree() == {"ContextualCompressionRetriever": {"Listed": {}, "rerank": {}}}


def test_the_trap_k_goes_to_the_base_retriever_of_a_compression_retriever():
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents(documents())
    retriever = ContextualCompressionRetriever(base_retriever=store.as_retriever(), base_compressor=compressor())

    assert len(retriever.invoke(QUERY)) == 3
    assert len(retriever.invoke(QUERY, k=1)) == 1


def test_in_a_compressor_pipeline():
    pipeline = DocumentCompressorPipeline(transformers=[compressor(top_n=2), compressor(top_n=1)])

    assert texts(pipeline.compress_documents(documents(), QUERY)) == ["red apple"]


async def test_in_an_async_compressor_pipeline():
    pipeline = DocumentCompressorPipeline(transformers=[compressor(top_n=2), compressor(top_n=1)])

    assert texts(await pipeline.acompress_documents(documents(), QUERY)) == ["red apple"]


def test_an_error_in_scoring_ends_the_run_and_surfaces():
    runs = Runs()

    with pytest.raises(DocumentScoringError):
        QwenRerankCompressor(scorer=TableScorer({})).compress_documents(documents(), QUERY, callbacks=[runs])

    assert [type(error) for error in runs.errors] == [DocumentScoringError]


class BrokenHandler(BaseCallbackHandler):
    raise_error = True

    def on_chain_start(self, *args, **kwargs):
        raise OSError("broken handler")


async def test_a_callback_that_raises_surfaces_and_blocks_nothing():
    reranks, callbacks = compressor(), [BrokenHandler()]

    with pytest.raises(OSError, match="broken handler"):
        reranks.compress_documents(documents(), QUERY, callbacks=callbacks)
    with pytest.raises(OSError, match="broken handler"):
        await reranks.acompress_documents(documents(), QUERY, callbacks=callbacks)

    assert len(reranks.compress_documents(documents(), QUERY)) == 3


@pytest.mark.parametrize(
    ("given", "query", "message"),
    [
        pytest.param(["red apple"], QUERY, r"documents\[0\] must be a LangChain document, not str", id="a string"),
        pytest.param("red apple", QUERY, "must be a list of LangChain documents, not str", id="one string"),
        pytest.param([Document("x")], "  ", "query is empty", id="no query"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(given, query, message):
    with pytest.raises(InvalidInputError, match=message):
        compressor().compress_documents(given, query)


def test_the_runnable_says_what_it_takes():
    with pytest.raises(InvalidInputError, match="the rerank step takes"):
        compressor().as_runnable().invoke({"question": QUERY})


def test_a_pickle_of_an_unknown_scorer_names_it_and_asks_for_it():
    with pytest.raises(InvalidInputError, match=r"OverlapScorer.*cannot be rebuilt.*scorer="):
        pickle.loads(pickle.dumps(compressor()))


def test_a_dump_for_tracing_holds_no_model():
    assert "not_implemented" in dumps(compressor())
