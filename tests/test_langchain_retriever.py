"""The two-stage retriever, LangChain's own retriever suite, a real chain, and LangChain retrievers as first stages."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableParallel, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests

from qwen_rerank import langchain
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.langchain import QwenRerankCompressor, QwenRerankRetriever, from_langchain
from qwen_rerank.pipeline import TwoStageRetriever
from qwen_rerank.protocols import FirstStage
from qwen_rerank.reranker import Reranker
from qwen_rerank.testing import HashEmbedder, OverlapScorer
from qwen_rerank.types import Candidate
from qwen_rerank.types import Document as PlainDocument
from tests.tracing import Runs

QUERY = "red apple"
TEXTS = ["blue sky", "red apple", "red sky", "green apple tree"]


class Shelf:
    """A first stage that gives its texts in their order and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def search(self, query, top_k, *, filter=None):
        self.asked.append((query, top_k, filter))
        return [
            Candidate(PlainDocument(f"d{i}", text, {"n": i}), 1.0 - i / 10, i + 1)
            for i, text in enumerate(TEXTS[:top_k])
        ]


class Listed(BaseRetriever):
    """Takes no k: gives the same documents to every query."""

    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(text, metadata={"score": 0.5}) for text in TEXTS]


class HashEmbeddings(Embeddings):
    """LangChain's face of the test embedder."""

    def embed_documents(self, texts):
        return HashEmbedder().embed_documents(texts).tolist()

    def embed_query(self, text):
        return HashEmbedder().embed_queries([text])[0].tolist()


@pytest.fixture
def store() -> InMemoryVectorStore:
    store = InMemoryVectorStore(HashEmbeddings())
    store.add_texts(TEXTS, ids=[f"d{i}" for i in range(len(TEXTS))])
    return store


def texts(found) -> list[str]:
    return [document.page_content for document in found]


class TestOverAFirstStage(RetrieversIntegrationTests):
    """LangChain's suite, over a first stage of this package."""

    @property
    def retriever_constructor(self):
        return QwenRerankRetriever

    @property
    def retriever_constructor_params(self):
        return {"first_stage": Shelf(), "scorer": OverlapScorer()}

    @property
    def retriever_query_example(self):
        return QUERY


class TestOverALangChainRetriever(TestOverAFirstStage):
    """LangChain's suite, over a LangChain retriever."""

    @property
    def retriever_constructor_params(self):
        return {"base_retriever": Listed(), "scorer": OverlapScorer()}


def test_the_best_k_of_fetch_k_candidates_with_both_scores():
    shelf = Shelf()
    found = QwenRerankRetriever(first_stage=shelf, scorer=OverlapScorer(), k=1, fetch_k=3).invoke(QUERY)

    assert shelf.asked == [(QUERY, 3, None)]
    assert [(d.id, d.metadata["n"], d.metadata["retrieval_score"]) for d in found] == [("d1", 1, 0.9)]
    assert found[0].metadata["relevance_score"] > 0.9


def test_k_and_fetch_k_and_filter_can_be_given_in_a_call():
    shelf = Shelf()
    retriever = QwenRerankRetriever(first_stage=shelf, scorer=OverlapScorer())

    assert len(retriever.invoke(QUERY, k=2, fetch_k=3, filter={"lang": "en"})) == 2
    assert len(retriever.invoke(QUERY, k=1)) == 1
    assert shelf.asked == [(QUERY, 3, {"lang": "en"}), (QUERY, 100, None)]


def test_there_are_never_fewer_candidates_than_answers():
    shelf = Shelf()
    QwenRerankRetriever(first_stage=shelf, scorer=OverlapScorer(), fetch_k=2).invoke(QUERY, k=4)

    assert shelf.asked == [(QUERY, 4, None)]


async def test_a_first_stage_is_awaited_where_it_can_be():
    class Waiting(Shelf):
        def search(self, query, top_k, *, filter=None):
            raise AssertionError("asearch is there")

        async def asearch(self, query, top_k, *, filter=None):
            return Shelf().search(query, top_k)

    retriever = QwenRerankRetriever(first_stage=Waiting(), scorer=OverlapScorer(), k=1)

    assert texts(await retriever.ainvoke(QUERY)) == ["red apple"]


@pytest.mark.parametrize("stage", ["first_stage", "base_retriever"])
def test_documents_are_converted_once_on_the_way_in_and_once_on_the_way_out(stage, monkeypatch):
    made = []
    for name in ("Document", "PlainDocument"):
        kind = getattr(langchain, name)
        monkeypatch.setattr(
            langchain, name, lambda *args, kind=kind, **fields: made.append(kind) or kind(*args, **fields)
        )

    QwenRerankRetriever(**{stage: Shelf() if stage == "first_stage" else Listed()}, scorer=OverlapScorer(), k=2).invoke(
        QUERY
    )

    assert made == ([Document] * 2 if stage == "first_stage" else [PlainDocument] * len(TEXTS))


def test_a_vector_store_gives_its_own_number_of_candidates_or_fetch_k(store):
    base = store.as_retriever(search_kwargs={"k": 1})

    own = QwenRerankRetriever(base_retriever=base, scorer=OverlapScorer())
    assert texts(own.invoke(QUERY)) == ["red apple"]
    assert len(own.invoke(QUERY, k=3, fetch_k=3)) == 3


def test_a_retriever_without_k_is_cut_to_fetch_k():
    retriever = QwenRerankRetriever(base_retriever=Listed(), scorer=OverlapScorer(), fetch_k=2, k=2)

    assert texts(retriever.invoke(QUERY)) == ["red apple", "blue sky"]


async def test_async_gives_the_same(store):
    for stage in ({"first_stage": Shelf()}, {"base_retriever": store.as_retriever()}):
        retriever = QwenRerankRetriever(**stage, scorer=OverlapScorer(), k=2)

        assert await retriever.ainvoke(QUERY) == retriever.invoke(QUERY)


def test_a_compressor_brings_the_second_stage_and_k_decides():
    compressor = QwenRerankCompressor(scorer=OverlapScorer(), top_n=4, threshold=0.4)

    assert texts(QwenRerankRetriever(first_stage=Shelf(), compressor=compressor, k=2).invoke(QUERY)) == [
        "red apple",
        "red sky",
    ]
    assert len(QwenRerankRetriever(first_stage=Shelf(), compressor=compressor).invoke(QUERY)) == 3


async def test_the_trace_shows_the_first_stage_and_the_rerank_step(store):
    retriever = QwenRerankRetriever(base_retriever=store.as_retriever(), scorer=OverlapScorer())
    expected = {"QwenRerankRetriever": {"VectorStoreRetriever": {}, "rerank": {}}}
    runs, later = Runs(), Runs()

    retriever.invoke(QUERY, config={"callbacks": [runs]})
    await retriever.ainvoke(QUERY, config={"callbacks": [later]})

    assert runs.tree() == later.tree() == expected
    assert sorted(runs.ended) == ["QwenRerankRetriever", "VectorStoreRetriever", "rerank"]


def answer_chain(source):
    prompt = ChatPromptTemplate.from_template("Context: {context}\nQuestion: {query}")
    model = FakeListChatModel(responses=["It is red."])
    return (
        source | {"context": lambda found: texts(found), "query": lambda _: QUERY} | prompt | model | StrOutputParser()
    )


def test_in_a_chain_as_the_retriever(store):
    runs = Runs()
    retriever = QwenRerankRetriever(base_retriever=store.as_retriever(), scorer=OverlapScorer(), k=1)

    assert answer_chain(retriever).invoke(QUERY, config={"callbacks": [runs]}) == "It is red."
    assert runs.tree()["RunnableSequence"]["QwenRerankRetriever"] == {"VectorStoreRetriever": {}, "rerank": {}}


async def test_in_a_chain_as_a_runnable_of_its_own(store):
    compressor = QwenRerankCompressor(scorer=OverlapScorer(), top_n=1)
    both = RunnableParallel(documents=store.as_retriever(), query=RunnablePassthrough())
    found = both | compressor.as_runnable()

    assert texts(found.invoke(QUERY)) == texts(await found.ainvoke(QUERY)) == ["red apple"]
    assert answer_chain(found).invoke(QUERY) == "It is red."


def test_batches_keep_the_order_of_their_queries():
    retriever = QwenRerankRetriever(first_stage=Shelf(), scorer=OverlapScorer(), k=1)

    assert [texts(found) for found in retriever.batch(["green tree", "blue sky"])] == [
        ["green apple tree"],
        ["blue sky"],
    ]


def test_any_langchain_retriever_is_a_first_stage_in_three_lines(store):
    first_stage = from_langchain(store.as_retriever())
    search = TwoStageRetriever(first_stage, Reranker(OverlapScorer()), top_k=4, top_n=2)
    hits = search.retrieve(QUERY)

    assert isinstance(first_stage, FirstStage)
    assert [(hit.document.id, hit.document.text) for hit in hits] == [("d1", "red apple"), ("d2", "red sky")]
    assert len(first_stage.search(QUERY, 3)) == 3


def test_a_first_stage_made_of_a_retriever_tells_scores_ranks_and_ids():
    found = from_langchain(Listed()).search(QUERY, 2)

    assert [(c.score, c.rank, c.document.text) for c in found] == [(0.5, 1, "blue sky"), (0.5, 2, "red apple")]
    assert found[0].document.id == PlainDocument.from_text("blue sky").id


def test_a_filter_that_nobody_can_pass_on_is_refused():
    with pytest.raises(InvalidInputError, match="filter must be None"):
        from_langchain(Listed()).search(QUERY, 2, filter={"lang": "en"})
    with pytest.raises(InvalidInputError, match="filter works with a first_stage"):
        QwenRerankRetriever(base_retriever=Listed(), scorer=OverlapScorer()).invoke(QUERY, filter={"lang": "en"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({}, "either first_stage or base_retriever", id="no first stage"),
        pytest.param({"first_stage": Shelf(), "base_retriever": Listed()}, "and not both", id="two first stages"),
        pytest.param({"first_stage": Listed()}, "goes into base_retriever", id="a retriever as first stage"),
        pytest.param({"base_retriever": Shelf()}, "goes into first_stage", id="a first stage as retriever"),
        pytest.param({"first_stage": Shelf(), "k": 0}, "k must be an integer of at least 1", id="no answers"),
        pytest.param({"first_stage": Shelf(), "fetch_k": True}, "fetch_k must be an integer", id="a boolean"),
        pytest.param({"first_stage": Shelf(), "top_n": 3}, "no parameter 'top_n'; it takes", id="an unknown name"),
        pytest.param(
            {"first_stage": Shelf(), "compressor": QwenRerankCompressor(), "threshold": 0.5},
            "compressor brings its own threshold",
            id="a setting of the compressor",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        QwenRerankRetriever(**settings)


def test_a_thing_that_is_no_retriever_is_refused():
    with pytest.raises(InvalidInputError, match="must be a LangChain retriever, not a Shelf"):
        from_langchain(Shelf())
