"""BM25 over words, and over characters and pairs of characters where there are no spaces."""

from __future__ import annotations

import gzip
import json

import ir_measures
import pytest

from qwen_rerank import BM25Index, Document
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.lexical import terms

CITIES = [
    Document("1", "Paris is the capital of France.", {"lang": "en"}),
    Document("2", "北京是中国的首都。", {"lang": "zh"}),
    Document("3", "The capital gains tax in Paris.", {"lang": "en"}),
    Document("4", "", {"lang": "en"}),
]


def ids(hits):
    return [hit.document.id for hit in hits]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("The Cats of ROME!", ["cats", "rome"], id="lower case, no stop words"),
        pytest.param("量子位", ["量", "子", "位", "量子", "子位"], id="characters and pairs"),
        pytest.param("用GPT4写代码", ["用", "gpt4", "写", "代", "码", "写代", "代码"], id="mixed"),
        pytest.param("ＢＭ２５", ["bm25"], id="full width"),
        pytest.param("read_file(x)", ["read", "file", "x"], id="names in code"),
        pytest.param("naïve Straße Москва", ["naïve", "straße", "москва"], id="other alphabets"),
        pytest.param("हिन्दी में", ["हिन्दी", "में"], id="vowel signs"),
        pytest.param("İSTANBUL cafe\u0301 x\u0301y", ["istanbul", "café", "x\u0301y"], id="accents of their own"),
        pytest.param("ไทย กขค", ["ไท", "ทย", "กข", "ขค"], id="no spaces between words"),
        pytest.param("𠀀𠀁", ["𠀀", "𠀁", "𠀀𠀁"], id="rare Han characters"),
        pytest.param(" ,.。！", [], id="nothing"),
    ],
)
def test_terms(text, expected):
    assert terms(text) == expected


def test_the_best_match_comes_first_and_documents_without_a_match_stay_out():
    hits = BM25Index(CITIES).search("capital of France", 10)

    assert ids(hits) == ["1", "3"]
    assert [hit.rank for hit in hits] == [1, 2]
    assert hits[0].score > hits[1].score > 0


def test_chinese_is_found_without_spaces():
    assert ids(BM25Index(CITIES).search("中国首都", 10)) == ["2"]


def test_top_k_is_filled_after_the_filter():
    assert ids(BM25Index(CITIES).search("capital Paris 首都", 1, filter={"lang": "zh"})) == ["2"]
    assert BM25Index(CITIES).search("capital", 5, filter={"region": "eu"}) == []


def test_equal_scores_keep_the_order_of_the_documents():
    assert ids(BM25Index([Document(name, "same words") for name in "cab"]).search("words", 2)) == ["c", "a"]


@pytest.mark.parametrize("documents", [[], [""], ["。"]])
def test_nothing_is_found_where_there_is_nothing(documents):
    assert BM25Index(documents).search("anything", 3) == []


def test_a_query_without_known_terms_finds_nothing():
    assert BM25Index(CITIES).search("the ???", 3) == []
    assert BM25Index(CITIES).search("xylophone", 3) == []


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([Document("1", "a"), Document("1", "b")], r"documents\[1\] repeats the id '1'"),
        (["a", 3], r"documents\[1\] must be a string or a Document, not int"),
        (["\ud800"], r"documents\[0\] holds a lone surrogate"),
    ],
)
def test_wrong_documents_are_named(documents, message):
    with pytest.raises(InvalidInputError, match=message):
        BM25Index(documents)


@pytest.mark.parametrize("top_k", [0, -1, True, "3"])
def test_top_k_is_checked(top_k):
    with pytest.raises(InvalidInputError, match="top_k"):
        BM25Index(CITIES).search("capital", top_k)


@pytest.mark.parametrize(("name", "published"), [("scifact", 0.6627), ("dureader_demo", 0.7396)])
def test_the_published_quality_is_reached(shared, name, published):
    """nDCG@10 of an independent plain BM25 over the same texts, as the collections' own pages give it."""
    documents, queries, qrels = read_collection(shared / "data" / name)
    index = BM25Index(documents)
    run = {query: {hit.document.id: -hit.rank for hit in index.search(queries[query], 10)} for query in qrels}

    assert ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10] == pytest.approx(
        published, abs=0.002
    )


def read_collection(folder):
    plain, packed = folder / "corpus.jsonl", folder / "corpus.jsonl.gz"
    corpus = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    rows = map(json.loads, corpus.splitlines())
    documents = [Document(row["_id"], f"{row['title']} {row['text']}") for row in rows]
    queries = {row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").open(encoding="utf-8"))}
    qrels = {}
    for line in (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        qrels.setdefault(query, {})[document] = int(grade)
    return documents, queries, qrels


def test_a_document_of_another_library_is_named_with_its_library():
    from langchain_core.documents import Document as Page

    with pytest.raises(InvalidInputError, match=r"a Document, not langchain_core\.documents\.base\.Document"):
        BM25Index([Page("text")])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"documents": 5}, "documents"),
        ({"documents": "abc"}, "documents"),
        ({"k1": 0}, "k1"),
        ({"k1": "x"}, "k1"),
        ({"b": 7}, "b"),
    ],
)
def test_wrong_arguments_are_named_when_they_are_given(arguments, name):
    with pytest.raises(InvalidInputError, match=f"^{name} must be"):
        BM25Index(**{"documents": ["a"], **arguments})
