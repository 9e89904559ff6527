"""Random operations against a dictionary and brute force."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from qwen_rerank import BM25Index
from qwen_rerank.store import DuplicateIdError, FaissStore
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

EMBEDDER = HashEmbedder(24)
WORDS = ["apple", "pear", "tree", "root", "红", "green", "!"]


def random_document(rng: random.Random) -> Document:
    text = " ".join(rng.choices(WORDS, k=rng.randrange(5)))
    return Document(f"d{rng.randrange(30)}", text, {"group": rng.randrange(3)})


def best(model: dict[str, Document], query: str, group: int | None) -> list[tuple[str, float]]:
    """Every document with a vector, best first, in order of arrival."""
    chosen = [document for document in model.values() if group in (None, document.metadata["group"])]
    vectors = EMBEDDER.embed_documents([document.text for document in chosen])
    scores = vectors @ EMBEDDER.embed_queries([query])[0]
    with_vector = [
        (document.id, float(score)) for document, score, row in zip(chosen, scores, vectors, strict=True) if row.any()
    ]
    return sorted(with_vector, key=lambda pair: -round(pair[1], 5))


def ids(candidates) -> list[str]:
    return [candidate.document.id for candidate in candidates]


def lexical(model: dict[str, Document], query: str, chosen: list[Document]):
    """What an index over all documents, made just now, finds among the chosen ones."""
    found = [hit for hit in BM25Index(model.values()).search(query, 99) if hit.document in chosen]
    return [replace(hit, rank=rank) for rank, hit in enumerate(found, start=1)]


def compare(store: FaissStore, model: dict[str, Document], rng: random.Random) -> None:
    assert len(store) == len(model)
    assert store.get(model) == list(model.values())
    group = rng.choice([None, 0, 1, 2])
    query = rng.choice(WORDS[:-1]) + " tree"
    filter = None if group is None else {"group": group}
    chosen = [document for document in model.values() if group in (None, document.metadata["group"])]
    assert sorted(ids(store.search(query, 99, filter=filter))) == sorted(
        {*ids(store.search(query, 99, mode="dense", filter=filter)), *ids(lexical(model, query, chosen))}
    )
    assert store.search(query, 9, mode="lexical", filter=filter) == lexical(model, query, chosen)[:9]
    found = store.search(query, 99, mode="dense", filter=filter)
    expected = best(model, query, group)
    assert {hit.document.id for hit in found} == {id for id, _ in expected}
    np.testing.assert_allclose([hit.score for hit in found], [score for _, score in expected], atol=1e-5)
    for hit in found:
        assert hit.document == model[hit.document.id]


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
@pytest.mark.parametrize("seed", range(4))
def test_a_store_is_a_dictionary_that_can_be_searched(tmp_path, index, seed, full):
    rng = random.Random(seed)
    model: dict[str, Document] = {}
    store = FaissStore.create(tmp_path / "store", EMBEDDER, index=index)
    for _ in range(2000 if full else 60):
        batch = [random_document(rng) for _ in range(rng.randrange(1, 6))]
        kind = rng.choice(["add", "upsert", "upsert", "delete", "reopen", "compact", "crash"])
        if kind == "add":
            names = [document.id for document in batch]
            if len(set(names)) < len(names) or model.keys() & set(names):
                with pytest.raises(DuplicateIdError):
                    store.add(batch)
            else:
                store.add(batch)
                model.update({document.id: document for document in batch})
        elif kind == "upsert":
            store.upsert(batch)
            for document in batch:
                model.pop(document.id, None)
            for document in batch:
                model.pop(document.id, None)
                model[document.id] = document
        elif kind == "delete":
            names = [document.id for document in batch]
            report = store.delete(names)
            assert report.deleted == len(model.keys() & set(names))
            model = {id: document for id, document in model.items() if id not in names}
        elif kind == "compact":
            store.compact()
        else:
            if kind == "crash":
                store._vectors._unsaved = store._words._unsaved = 0  # the index files are left behind
            store.close()
            store = FaissStore.open(tmp_path / "store", EMBEDDER)
        compare(store, model, rng)
    assert store.verify().ok
    store.close()
