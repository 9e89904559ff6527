"""LlamaIndex's vector store: nodes come back as they were, filters, deletion, modes, and an index over a real folder."""

from __future__ import annotations

import threading

import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.schema import Document, ImageNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from qwen_rerank import FaissStore
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.langchain import QwenVectorStore as LangChainStore
from qwen_rerank.llama_index import QwenVectorStore
from qwen_rerank.testing import HashEmbedder

EMBEDDER = HashEmbedder(64)
TEXTS = {"apple": "a red apple on a tree", "pear": "a green pear on a tree", "carrot": "an orange carrot in the ground"}
ABOUT = {
    "apple": {"year": 2020, "tags": ["a", "b"], "none": []},
    "pear": {"year": 2021, "tags": ["b"]},
    "carrot": {"year": 2022, "kind": "root"},
}


def node(name: str, source: str = "book") -> TextNode:
    related = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source)}
    vector = EMBEDDER.embed_documents([TEXTS[name]])[0].tolist()
    return TextNode(id_=name, text=TEXTS[name], metadata=dict(ABOUT[name]), embedding=vector, relationships=related)


@pytest.fixture
def store(tmp_path):
    made = QwenVectorStore.from_folder(tmp_path / "store", EMBEDDER)
    made.add([node("apple"), node("pear"), node("carrot", "field")])
    yield made
    made.close()


def ask(text: str = "red apple", top_k: int = 3, **options) -> VectorStoreQuery:
    vector = EMBEDDER.embed_queries([text])[0].tolist()
    return VectorStoreQuery(query_embedding=vector, query_str=text, similarity_top_k=top_k, **options)


def where(key, value, operator=FilterOperator.EQ) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])


@pytest.mark.parametrize(
    ("mode", "first"),
    [
        (VectorStoreQueryMode.DEFAULT, "apple"),
        (VectorStoreQueryMode.HYBRID, "apple"),
        (VectorStoreQueryMode.SPARSE, "apple"),
        (VectorStoreQueryMode.TEXT_SEARCH, "apple"),
        (VectorStoreQueryMode.MMR, "apple"),
    ],
)
def test_every_mode_finds_nodes_best_first(store, mode, first):
    found = store.query(ask(mode=mode))

    assert found.ids[0] == first
    assert [one.node_id for one in found.nodes] == found.ids
    assert len(found.similarities) == len(found.ids)


def test_nodes_come_back_as_they_were(store):
    original = node("apple")
    original.embedding = None

    assert store.get_nodes(["apple", "nobody"]) == [original]
    image = ImageNode(id_="image", text="a picture", image_url="http://x/y.png", embedding=[1.0] * 64)
    store.add([image])
    assert store.get_nodes(["image"])[0].image_url == "http://x/y.png"


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (where("year", 2020), {"apple"}),
        (where("year", 2021, FilterOperator.GTE), {"pear", "carrot"}),
        (where("year", 2021, FilterOperator.NE), {"apple", "carrot"}),
        (where("year", [2020, 2022], FilterOperator.IN), {"apple", "carrot"}),
        (where("year", [2020, 2022], FilterOperator.NIN), {"pear"}),
        (where("tags", "b", FilterOperator.CONTAINS), {"apple", "pear"}),
        (where("tags", ["a", "b"], FilterOperator.ALL), {"apple"}),
        (where("tags", ["a", "z"], FilterOperator.ANY), {"apple"}),
        (where("none", None, FilterOperator.IS_EMPTY), {"apple", "pear", "carrot"}),
        (where("tags", None, FilterOperator.IS_EMPTY), {"carrot"}),
        (
            MetadataFilters(
                filters=[MetadataFilter(key="year", value=2020), where("kind", "root")], condition=FilterCondition.OR
            ),
            {"apple", "carrot"},
        ),
        (
            MetadataFilters(filters=[MetadataFilter(key="year", value=2020)], condition=FilterCondition.NOT),
            {"pear", "carrot"},
        ),
        (MetadataFilters(filters=[]), {"apple", "pear", "carrot"}),
    ],
)
def test_filters_are_those_of_llama_index(store, filters, expected):
    assert set(store.query(ask(filters=filters)).ids) == expected
    assert {one.node_id for one in store.get_nodes(filters=filters)} == expected


@pytest.mark.parametrize("operator", [FilterOperator.TEXT_MATCH, FilterOperator.ANY])
def test_an_operator_that_there_is_not_says_what_there_is(store, operator):
    with pytest.raises(InvalidInputError, match=r"operator .* there are ==, .*is_empty"):
        store.query(ask(filters=where("kind", "r", operator)))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (ask(mode=VectorStoreQueryMode.SVM), "mode='svm' is not known"),
        (VectorStoreQuery(query_str="x"), "no query_embedding"),
        (ask(top_k=0), "similarity_top_k must be an integer of at least 1, not 0"),
        (VectorStoreQuery(query_embedding=[1.0] * 64, mode=VectorStoreQueryMode.HYBRID), "no query_str"),
    ],
)
def test_a_query_that_cannot_be_answered_says_why(store, query, message):
    with pytest.raises(InvalidInputError, match=message):
        store.query(query)


def test_alpha_is_the_share_of_the_vectors(store):
    store.add([TextNode(id_="code", text="E1234", embedding=(-EMBEDDER.embed_queries(["E1234"])[0]).tolist())])

    for alpha, first in ((0.0, "code"), (1.0, "apple")):
        query = ask("E1234", mode=VectorStoreQueryMode.HYBRID, alpha=alpha)
        query.query_embedding = EMBEDDER.embed_queries([TEXTS["apple"]])[0].tolist()
        assert store.query(query).ids[0] == first


def test_ids_of_nodes_and_documents_narrow_a_query(store):
    assert store.query(ask(node_ids=["carrot", "pear"])).ids == ["pear", "carrot"]
    assert store.query(ask(doc_ids=["field"])).ids == ["carrot"]


@pytest.mark.parametrize(
    ("plain", "awaited", "arguments"),
    [
        ("add", "async_add", [[]]),
        ("delete", "adelete", ["book"]),
        ("delete_nodes", "adelete_nodes", [["apple"]]),
        ("clear", "aclear", []),
        ("get_nodes", "aget_nodes", [["apple"]]),
        ("query", "aquery", [ask()]),
    ],
)
async def test_the_event_loop_goes_on_while_the_store_works(store, monkeypatch, plain, awaited, arguments):
    monkeypatch.setattr(QwenVectorStore, plain, lambda self, *given: threading.get_ident())

    assert await getattr(store, awaited)(*arguments) != threading.get_ident()


async def test_what_is_awaited_does_what_the_plain_call_does(store):
    await store.async_add([node("apple"), node("pear")])
    assert (await store.aquery(ask(top_k=1))).ids == ["apple"]
    await store.adelete("field")
    await store.adelete_nodes(["pear"])
    assert [one.node_id for one in await store.aget_nodes()] == ["apple"]
    await store.aclear()
    assert store.get_nodes() == []


def test_a_retriever_says_how_much_diverse_results_differ(tmp_path):
    store = QwenVectorStore.from_folder(tmp_path / "store", EMBEDDER)
    texts = {"1": "red apple tree", "2": "red apple tree red", "3": "green pear tree"}
    vectors = EMBEDDER.embed_documents(list(texts.values()))
    store.add(
        [
            TextNode(id_=id, text=text, embedding=row.tolist())
            for (id, text), row in zip(texts.items(), vectors, strict=True)
        ]
    )
    query = ask("red apple tree", 2, mode=VectorStoreQueryMode.MMR)

    assert store.query(query, mmr_threshold=1.0).ids == ["1", "2"]
    assert store.query(query, mmr_threshold=0.2).ids == ["1", "3"]
    for wrong in ({"mmr_treshold": 1.0}, {"mmr_threshold": 7}):
        with pytest.raises(InvalidInputError, match="mmr_threshold"):
            store.query(query, **wrong)
    store.close()


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [([[1.0] * 64, None], "node 'n1' has no embedding"), ([[1.0] * 64, [1.0]], "equally long rows")],
)
def test_a_node_without_a_vector_of_its_own_length_is_refused(store, embeddings, message):
    with pytest.raises(InvalidInputError, match=message):
        store.add([TextNode(id_=f"n{i}", text="a plum", embedding=one) for i, one in enumerate(embeddings)])

    assert store.get_nodes(["n0"]) == []


@pytest.mark.parametrize("related", [{}, {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}])
def test_metadata_of_a_node_that_is_named_like_its_source_comes_back(store, related):
    metadata = {"ref_doc_id": "my own", "_node_id": 5}
    store.add([TextNode(id_="plum", text="a plum", metadata=metadata, embedding=[1.0] * 64, relationships=related)])

    [found] = store.get_nodes(["plum"])
    assert (found.metadata, found.ref_doc_id) == (metadata, "book" if related else None)


def test_deletion(store):
    store.delete("book")
    assert [one.node_id for one in store.get_nodes()] == ["carrot"]
    store.add([node("apple"), node("pear")])
    store.delete_nodes(["apple", "pear"], where("year", 2020))
    store.delete_nodes(filters=where("year", 2022))
    assert [one.node_id for one in store.get_nodes()] == ["pear"]
    store.clear()
    assert store.get_nodes() == []


def test_an_added_node_replaces_the_one_before(store):
    store.add([node("apple")])

    assert len(store.client) == 3


def test_both_frameworks_open_the_same_folder(store, tmp_path):
    store.close()

    other = LangChainStore.from_folder(tmp_path / "store", EMBEDDER)
    [found] = other.similarity_search("red apple", k=1)
    assert (found.id, found.metadata["year"], found.page_content) == ("apple", 2020, TEXTS["apple"])
    assert not any(key.startswith("_node") for key in found.metadata)
    other.add_texts(["a plum"], [{"year": 2030}], ids=["plum"])
    other.close()
    again = QwenVectorStore.from_folder(tmp_path / "store")
    assert again.get_nodes(["plum"]) == [TextNode(id_="plum", text="a plum", metadata={"year": 2030})]
    again.close()


def test_a_store_of_words_alone_takes_nodes_without_vectors(tmp_path):
    store = QwenVectorStore.from_folder(tmp_path / "words")
    store.add([TextNode(id_="a", text="a red apple")])

    assert store.query(VectorStoreQuery(query_str="apple", mode=VectorStoreQueryMode.SPARSE)).ids == ["a"]
    store.close()


def test_an_index_and_its_query_engine_run_over_a_folder(tmp_path):
    model = MockEmbedding(embed_dim=8)
    store = QwenVectorStore.from_folder(tmp_path / "store", model)
    documents = [Document(doc_id=name, text=text, metadata=ABOUT[name]) for name, text in TEXTS.items()]
    context = StorageContext.from_defaults(vector_store=store)
    VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=model)
    store.close()

    again = QwenVectorStore.from_folder(tmp_path / "store", model)
    index = VectorStoreIndex.from_vector_store(again, embed_model=model)
    engine = index.as_query_engine(
        llm=MockLLM(),
        vector_store_query_mode="hybrid",
        similarity_top_k=1,
        filters=where("year", 2021, FilterOperator.GTE),
    )
    answer = engine.query("carrot in the ground")
    assert [hit.node.get_content() for hit in answer.source_nodes] == [TEXTS["carrot"]]
    index.delete_ref_doc("carrot")
    assert {one.metadata["year"] for one in again.get_nodes()} == {2020, 2021}
    again.close()


def test_what_is_no_store_is_refused():
    with pytest.raises(InvalidInputError, match="must be a FaissStore, not NoneType"):
        QwenVectorStore(None)


def test_a_store_can_be_given(tmp_path):
    with FaissStore.create(tmp_path / "s", EMBEDDER) as plain:
        given = QwenVectorStore(plain)
        given.add([node("apple")])
        assert (given.client is plain, given.class_name(), given.stores_text) == (True, "QwenVectorStore", True)
