"""What may be stored: vectors, ids, texts and metadata, taken as they are or refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank import FaissStore
from qwen_rerank.errors import InvalidInputError, InvalidTextError
from qwen_rerank.store import DimensionMismatchError, InvalidEmbeddingError
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document
from tests.store.conftest import FRUIT

# Vectors


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_vector_that_is_not_finite_rejects_the_whole_batch(store, bad):
    vectors = np.ones((1000, 32))
    vectors[7, 3] = bad

    with pytest.raises(InvalidEmbeddingError, match=r"vectors\[7\] holds NaN or infinity") as caught:
        store.add([f"text {i}" for i in range(1000)], vectors=vectors)

    assert (caught.value.row, len(store)) == (7, len(FRUIT))


def test_a_given_vector_of_zeros_is_refused(store):
    with pytest.raises(InvalidEmbeddingError, match=r"vectors\[1\] is all zeros"):
        store.add(["a", "b"], vectors=np.array([[1.0] * 32, [0.0] * 32]))
    with pytest.raises(InvalidEmbeddingError, match=r"vectors\[0\] is all zeros"):
        store.search_vectors(np.zeros((1, 32)))


@pytest.mark.parametrize("shape", [(1, 31), (32,), (2, 32), (1, 1, 32), (0, 31)])
def test_vectors_of_another_shape_are_refused(store, shape):
    with pytest.raises(DimensionMismatchError, match="must have shape"):
        store.add(["a"], vectors=np.ones(shape, dtype=np.float32))


@pytest.mark.parametrize("dtype", [object, complex, bool, "U8"])
def test_vectors_that_are_no_numbers_are_refused(store, dtype):
    with pytest.raises(InvalidInputError, match="real numbers"):
        store.search_vectors(np.ones((1, 32)).astype(dtype))


@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(np.arange(1, 65).reshape(2, 32), id="integers"),
        pytest.param(np.arange(1, 65, dtype=np.float64).reshape(2, 32) * 1e30, id="large float64"),
        pytest.param(np.arange(1, 65, dtype=np.float16).reshape(32, 2).T, id="not contiguous"),
        pytest.param(np.arange(1, 65, dtype=np.float32).reshape(2, 32) * np.float32(1e-42), id="denormal"),
    ],
)
def test_vectors_of_other_kinds_are_scaled_to_length_1(store, vectors):
    store.add(["a", "b"], vectors=vectors)

    assert store.search_vectors(vectors[:1], 1)[0][0].score == pytest.approx(1.0, abs=1e-3)


def test_no_vectors_find_nothing(store):
    assert store.search_vectors(np.empty((0, 32))) == []


class OddEmbedder(HashEmbedder):
    rows = None

    def embed_documents(self, texts):
        return self.rows


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (np.ones((1, 31), np.float32), DimensionMismatchError),
        (np.ones((2, 32), np.float32), DimensionMismatchError),
        (np.full((1, 32), np.nan, np.float32), InvalidEmbeddingError),
        (None, DimensionMismatchError),
    ],
)
def test_an_embedder_that_gives_rubbish_is_refused(path, rows, error):
    embedder = OddEmbedder(32)
    with FaissStore.create(path, embedder) as store:
        embedder.rows = rows
        with pytest.raises(error):
            store.add(["text"])
        assert len(store) == 0


# Ids, texts and metadata


@pytest.mark.parametrize("id", ["-1", str(2**64), "x" * 1_000_000, "a\0b", "a", "\u202e", " ", "../../etc"])
def test_any_id_comes_back_as_it_is(store, id):
    store.add([Document(id, "odd one"), Document(id + "\0", "other")])

    assert [document.id for document in store.get([id])] == [id]
    assert store.delete([id]).deleted == 1
    assert store.get([id]) == []


@pytest.mark.parametrize(
    ("id", "message"), [("", "is empty"), (3, "must be a string"), (None, "string"), ("\ud800", "surrogate")]
)
def test_an_id_that_cannot_be_is_refused(store, id, message):
    with pytest.raises(InvalidInputError, match=rf"documents\[0\].id.*{message}"):
        store.add([Document(id, "text")])
    with pytest.raises(InvalidInputError, match=rf"ids\[0\].*{message}"):
        store.get([id])


@pytest.mark.parametrize("text", ["a\0b", "x" * 50_000_000, "😀👩‍👩‍👧", "a\r\nb\rc", "\ufeff", " "])
def test_any_text_comes_back_as_it_is(path, text):
    embedder = HashEmbedder(2)
    with FaissStore.create(path, embedder) as store:
        store.add([Document("a", text)], vectors=np.ones((1, 2)))
    with FaissStore.open(path, embedder, read_only=True) as store:
        assert store.get(["a"])[0].text == text


def test_a_lone_surrogate_is_refused_with_its_place(store):
    with pytest.raises(InvalidTextError, match=r"documents\[1\].text holds a lone surrogate"):
        store.add([Document("a", "fine"), Document("b", "bad \ud83d")])
    with pytest.raises(InvalidTextError, match="surrogate"):
        store.add([Document("a", "fine", {"k": "\ud83d"})])


def test_a_lone_surrogate_can_be_replaced(store):
    """Two halves that belong together are one character, as any other text of that character is."""
    texts = ["half \ud83d", "whole \ud83d\ude00", "fine 😀"]

    ids_of = store.add([Document("a", texts[0]), *texts[1:]], errors="replace")

    assert [document.text for document in store.get(ids_of)] == ["half \ufffd", "whole 😀", "fine 😀"]
    store.upsert([Document("a", "again \udfff")], errors="replace")
    assert store.get(["a"])[0].text == "again \ufffd"
    with pytest.raises(InvalidInputError, match="errors must be one of 'strict', 'replace', not 'ignore'"):
        store.add(["text"], errors="ignore")


@pytest.mark.parametrize(
    "metadata", [{1: "a"}, {"a": (1, 2)}, {"a": math.nan}, {"a": object()}, {"a": b"x"}, {"a": {1}}, None, 3]
)
def test_metadata_that_json_would_change_is_refused(store, metadata):
    with pytest.raises(InvalidInputError, match=r"documents\[0\].metadata"):
        store.add([Document("a", "text", metadata)])


@pytest.mark.parametrize("documents", ["text", b"text", FRUIT[0], 3, None, {"a": "b"}, [3], [None], [["a"]]])
def test_what_is_no_list_of_documents_is_refused(store, documents):
    with pytest.raises(InvalidInputError, match="documents"):
        store.add(documents)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=15)
@given(st.dictionaries(_text.filter(bool), st.tuples(_text, st.dictionaries(_text, _json, max_size=3)), max_size=4))
def test_what_is_stored_comes_back_equal(tmp_path_factory, contents):
    documents = [Document(id, text, metadata) for id, (text, metadata) in contents.items()]
    path = tmp_path_factory.mktemp("round") / "store"
    with FaissStore.create(path, HashEmbedder(4)) as store:
        store.add(documents)
    with FaissStore.open(path, HashEmbedder(4)) as store:
        assert store.get(contents) == documents
