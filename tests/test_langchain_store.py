"""LangChain's vector store: its own suite, filters, modes, scores, and a chain over a real folder."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.structured_query import Comparator, Comparison, Operation, Operator, StructuredQuery
from langchain_tests.integration_tests.vectorstores import VectorStoreIntegrationTests

from qwen_rerank import FaissStore
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.langchain import QwenVectorStore
from qwen_rerank.langchain_store import QwenTranslator
from qwen_rerank.store import EmbedderMismatchError
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Candidate
from qwen_rerank.types import Document as Text
from qwen_rerank.vector_stores import relevance

TEXTS = ["a red apple on a tree", "a green pear on a tree", "an orange carrot in the ground", "红苹果"]
ABOUT = [{"year": 2020, "tags": ["a"]}, {"year": 2021}, {"year": 2022}, {"lang": "zh"}]


class TestQwenVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path):
        store = QwenVectorStore.from_folder(tmp_path / "store", self.get_embeddings())
        yield store
        store.close()


@pytest.fixture
def fruit(tmp_path):
    store = QwenVectorStore.from_folder(tmp_path / "store", HashEmbedder(64))
    store.add_texts(TEXTS, ABOUT, ids=["apple", "pear", "carrot", "苹果"])
    yield store
    store.close()


def ids(documents):
    return [document.id for document in documents]


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"year": {"$gte": 2021}}, {"pear", "carrot"}),
        ({"$or": [{"lang": "zh"}, {"tags": {"$contains": "a"}}]}, {"apple", "苹果"}),
        (Comparison(comparator=Comparator.LT, attribute="year", value=2021), {"apple"}),
        (
            Operation(
                operator=Operator.NOT,
                arguments=[Comparison(comparator=Comparator.IN, attribute="year", value=[2020, 2021])],
            ),
            {"carrot", "苹果"},
        ),
    ],
)
def test_filters_are_dicts_or_those_of_structured_queries(fruit, filter, expected):
    assert set(ids(fruit.similarity_search("tree ground 苹果", k=9, filter=filter))) == expected


@pytest.mark.parametrize(
    ("comparator", "value", "expected"),
    [
        (Comparator.GTE, {"date": "2024-01-01", "type": "date"}, {"new"}),
        (Comparator.LT, {"datetime": "2024-01-01T00:00:00Z", "type": "datetime"}, {"old"}),
        (Comparator.IN, [{"date": "2023-05-06", "type": "date"}], {"old"}),
        (Comparator.EQ, {"date": "soon", "type": "date"}, {"unknown"}),
    ],
)
def test_dates_of_structured_queries_are_moments(tmp_path, comparator, value, expected):
    with FaissStore.create(tmp_path / "s", None) as plain:
        store = QwenVectorStore(plain)
        days = {"old": "2023-05-06", "new": "2024-05-06T07:00:00+02:00", "unknown": "soon"}
        store.add_texts(["tree"] * 3, ({"day": day} for day in days.values()), ids=list(days))
        asked = Comparison(comparator=comparator, attribute="day", value=value)

        assert set(ids(store.similarity_search("tree", filter=asked))) == expected


def test_a_reader_too_refuses_options_that_the_store_was_not_made_with(fruit, tmp_path):
    for wrong in ({"metric": "nonsense"}, {"metric": "ip"}, {"foo": 3}):
        with pytest.raises(InvalidInputError, match=r"metric|foo"):
            QwenVectorStore.from_folder(tmp_path / "store", HashEmbedder(64), read_only=True, **wrong)

    QwenVectorStore.from_folder(tmp_path / "store", read_only=True, metric="cosine", device="cpu").close()


def test_a_store_that_its_texts_do_not_get_into_is_not_kept_open(tmp_path):
    with pytest.raises(InvalidInputError) as failed:
        QwenVectorStore.from_texts(["a", "\ud800"], HashEmbedder(8), path=tmp_path / "s")

    QwenVectorStore.from_texts(["a"], HashEmbedder(8), path=tmp_path / "s").close()
    assert failed.value.__traceback__  # while it lives, so do the calls' variables


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.similarity_search("tree", filters={"year": 2020}),
        lambda store: store.similarity_search_with_score("tree", where={"year": 2020}),
        lambda store: store.max_marginal_relevance_search("tree", filters={"year": 2020}),
        lambda store: store.similarity_search_by_vector([1.0] * 64, mode="dense"),
        lambda store: store.max_marginal_relevance_search_by_vector([1.0] * 64, filters={}),
        lambda store: store.delete(["apple"], filters={"year": 1}),
    ],
)
def test_a_keyword_that_nothing_takes_is_refused(fruit, call):
    with pytest.raises(InvalidInputError, match=r"which it does not take; it takes .*filter"):
        call(fruit)


def test_no_fewer_than_one_diverse_document_can_be_asked_for(fruit):
    with pytest.raises(InvalidInputError, match="k must be an integer of at least 1, not -1"):
        fruit.max_marginal_relevance_search("tree", k=-1)


def test_metadata_that_begins_like_a_nodes_is_the_users(fruit):
    fruit.add_texts(["a plum"], [{"_node_id": 5}], ids=["plum"])

    assert fruit.get_by_ids(["plum"])[0].metadata == {"_node_id": 5}


@pytest.mark.parametrize(
    "filter",
    [
        lambda metadata: True,
        "year > 3",
        {"year": {"$like": 1}},
        Comparison(comparator=Comparator.LIKE, attribute="a", value="x"),
    ],
)
def test_what_is_no_filter_is_refused(fruit, filter):
    with pytest.raises(InvalidInputError, match="filter"):
        fruit.similarity_search("tree", filter=filter)


def test_a_structured_query_becomes_text_and_filter():
    query = StructuredQuery(
        query="apple", filter=Comparison(comparator=Comparator.EQ, attribute="a", value=1), limit=None
    )

    assert QwenTranslator().visit_structured_query(query) == ("apple", {"filter": {"a": {"$eq": 1}}})


def test_a_retriever_takes_k_filter_and_mode(fruit):
    retriever = fruit.as_retriever(search_kwargs={"k": 1, "filter": {"year": {"$gt": 2020}}, "mode": "lexical"})

    assert ids(retriever.invoke("red apple tree")) == ["pear"]


async def test_a_retriever_runs_beside_the_event_loop(fruit):
    assert ids(await fruit.as_retriever(search_kwargs={"k": 1}).ainvoke("red apple")) == ["apple"]


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid", None])
def test_relevance_is_between_0_and_1_and_keeps_the_order(fruit, mode):
    found = fruit.similarity_search_with_relevance_scores("red apple", k=4, mode=mode)
    scores = [score for _, score in found]

    assert all(0 <= score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)
    assert ids(document for document, _ in found) == ids(fruit.similarity_search("red apple", k=4, mode=mode))


@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (5, 5)])
def test_relevance_of_weighted_halves_is_1_for_what_is_first_in_both(fruit, weights):
    found = fruit.similarity_search_with_relevance_scores(TEXTS[0], k=4, mode="hybrid", weights=weights)
    scores = [score for _, score in found]

    assert scores[0] == pytest.approx(1)
    assert len(set(scores)) == len(scores)


def test_inner_products_above_1_keep_their_order_as_relevance():
    found = [relevance(Candidate(Text("a", "a"), score, 1, "ip")) for score in (28.0, 27.0, 1.0, 0.0, -9.0)]

    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 5
    assert 0 < found[-1] < found[0] < 1


def test_a_threshold_drops_what_is_not_relevant(fruit):
    kwargs = {"score_threshold": 0.9, "k": 4, "mode": "dense"}
    retriever = fruit.as_retriever(search_type="similarity_score_threshold", search_kwargs=kwargs)

    assert ids(retriever.invoke(TEXTS[0])) == ["apple"]


def test_mmr_prefers_what_differs(tmp_path):
    texts = ["red apple tree", "red apple tree red", "green pear tree"]
    with FaissStore.create(tmp_path / "s", HashEmbedder(64)) as plain:
        store = QwenVectorStore(plain)
        store.add_texts(texts, ids=["1", "2", "3"])

        assert ids(store.similarity_search("red apple tree", k=2, mode="dense")) == ["1", "2"]
        assert ids(store.max_marginal_relevance_search("red apple tree", k=2, lambda_mult=0.2, mode="dense")) == [
            "1",
            "3",
        ]
        vector = HashEmbedder(64).embed_queries(["red apple tree"])[0].tolist()
        assert ids(store.max_marginal_relevance_search_by_vector(vector, k=2, lambda_mult=0.2)) == ["1", "3"]
        assert ids(store.similarity_search_by_vector(vector, k=1)) == ["1"]
        assert ids(store.as_retriever(search_type="mmr", search_kwargs={"k": 1}).invoke("pear")) == ["3"]


def test_from_documents_makes_a_store_that_opens_again(tmp_path):
    documents = [Document(page_content=text, metadata=about) for text, about in zip(TEXTS, ABOUT, strict=True)]
    embedding = DeterministicFakeEmbedding(size=8)
    with pytest.raises(InvalidInputError, match="path is missing"):
        QwenVectorStore.from_documents(documents, embedding)
    QwenVectorStore.from_documents(documents, embedding, path=tmp_path / "s").close()

    again = QwenVectorStore.from_folder(tmp_path / "s", embedding, read_only=True)
    assert again.similarity_search("red apple", k=1, mode="lexical")[0].metadata == ABOUT[0]
    assert again.embeddings is embedding
    again.close()
    with pytest.raises(EmbedderMismatchError):
        QwenVectorStore.from_folder(tmp_path / "s", DeterministicFakeEmbedding(size=9))


def test_delete_by_filter_and_by_id(fruit):
    assert fruit.delete(filter={"year": {"$lt": 2022}})
    assert fruit.delete(["carrot", "nobody"])
    assert ids(fruit.get_by_ids(["apple", "pear", "carrot", "苹果"])) == ["苹果"]
    with pytest.raises(InvalidInputError, match="ids or a filter"):
        fruit.delete()


@pytest.mark.parametrize("arguments", [{"metadatas": [{}]}, {"ids": ["1"]}])
def test_lists_of_unlike_length_are_refused(fruit, arguments):
    with pytest.raises(InvalidInputError, match="1 entries for 2 texts"):
        fruit.add_texts(["a", "b"], **arguments)


def test_what_is_no_store_is_refused():
    with pytest.raises(InvalidInputError, match="must be a FaissStore, not str"):
        QwenVectorStore("folder")


def test_words_alone_need_no_embedding(tmp_path):
    store = QwenVectorStore.from_folder(tmp_path / "s")
    store.add_texts(TEXTS)

    assert [one.page_content for one in store.similarity_search("carrot", k=1)] == [TEXTS[2]]
    with pytest.raises(InvalidInputError, match="embedder"):
        store.max_marginal_relevance_search("carrot")
    store.close()


def test_a_chain_answers_from_a_folder(fruit):
    def join(documents):
        return " | ".join(document.page_content for document in documents)

    prompt = ChatPromptTemplate.from_template("{context} ?? {question}")
    model = RunnableLambda(lambda value: value.to_messages()[0].content)
    retriever = fruit.as_retriever(search_kwargs={"k": 2, "filter": {"year": {"$lte": 2021}}})
    chain = {"context": retriever | join, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()

    assert chain.invoke("red apple") == f"{TEXTS[0]} | {TEXTS[1]} ?? red apple"
