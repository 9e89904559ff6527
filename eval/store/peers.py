"""The FAISS stores of LangChain and LlamaIndex beside ours: the same passages, vectors and exact index in each.

pip install langchain-community llama-index-vector-stores-faiss
python eval/store/peers.py build/scale > eval/store/peers.json

The folder is the one that `scale.py build` fills. Query embedding is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_community.vectorstores.utils import DistanceStrategy
from langchain_core.embeddings import DeterministicFakeEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.faiss import FaissVectorStore
from scale import TOP_K, conditions, milliseconds, say, share_of, timed

from qwen_rerank import Document, FaissStore, load_embedder

N_PASSAGES = 100_000  # of the folder's; more would not fit into memory for all three
SHARE = 0.01  # of the documents, that the filter keeps


def ours(folder: Path, texts: list[str], vectors: np.ndarray, asked: np.ndarray) -> dict[str, Any]:
    """Return times of a FaissStore with an exact index, and how many of 100 documents a filtered search gives."""
    embedder, shares = load_embedder("pocket"), share_of(len(texts)).tolist()
    documents = [Document(str(n), text, {"share": shares[n]}) for n, text in enumerate(texts)]
    store = FaissStore.create(folder / "ours", embedder, index="Flat", words=False, indexed_fields=["share"])
    added, _ = timed(lambda: store.add(documents, vectors=vectors))
    saved, _ = timed(store.close)
    loaded, store = timed(lambda: FaissStore.open(folder / "ours", embedder))
    kept = {"share": {"$lt": SHARE}}
    result = {
        "add_s": added,
        "save_s": saved,
        "load_s": loaded,
        "search": milliseconds(lambda n: store.search_vectors(asked[n : n + 1], TOP_K), len(asked)),
        "filtered": milliseconds(lambda n: store.search_vectors(asked[n : n + 1], TOP_K, filter=kept), len(asked)),
        "filtered_found": found_on_average(
            lambda n: store.search_vectors(asked[n : n + 1], TOP_K, filter=kept)[0], len(asked)
        ),
    }
    deleted, _ = timed(lambda: store.delete(["7"]))
    store.close()
    return {**result, "delete_one_s": deleted}


def of_langchain(folder: Path, texts: list[str], vectors: np.ndarray, asked: np.ndarray) -> dict[str, Any]:
    """Return the same of `langchain_community.vectorstores.FAISS`; it fetches as many as the filter needs."""
    shares = share_of(len(texts)).tolist()
    fake = DeterministicFakeEmbedding(size=vectors.shape[1])
    store = FAISS(
        fake,
        faiss.IndexFlatIP(vectors.shape[1]),
        InMemoryDocstore(),
        {},
        distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT,
    )
    pairs = list(zip(texts, vectors.tolist(), strict=True))
    names = [str(n) for n in range(len(texts))]
    added, _ = timed(lambda: store.add_embeddings(pairs, [{"share": one} for one in shares], ids=names))
    saved, _ = timed(lambda: store.save_local(str(folder / "langchain")))
    loaded, store = timed(
        lambda: FAISS.load_local(
            str(folder / "langchain"),
            fake,
            allow_dangerous_deserialization=True,  # it is a pickle; this one we have just written
            distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT,
        )
    )

    def search(n: int, **options: Any) -> list[Any]:
        return store.similarity_search_with_score_by_vector(asked[n].tolist(), k=TOP_K, **options)  # type: ignore[no-any-return]

    def kept(metadata: dict[str, Any]) -> bool:
        return bool(metadata["share"] < SHARE)

    result = {
        "add_s": added,
        "save_s": saved,
        "load_s": loaded,
        "search": milliseconds(search, len(asked)),
        "filtered": milliseconds(lambda n: search(n, filter=kept), len(asked)),
        "filtered_found": found_on_average(lambda n: search(n, filter=kept), len(asked)),
        "filtered_found_if_all_are_fetched": found_on_average(
            lambda n: search(n, filter=kept, fetch_k=len(texts)), min(5, len(asked))
        ),
        "filtered_if_all_are_fetched": milliseconds(
            lambda n: search(n, filter=kept, fetch_k=len(texts)), min(5, len(asked))
        ),
    }
    deleted, _ = timed(lambda: store.delete(["7"]))
    return {**result, "delete_one_s": deleted}


def of_llama_index(folder: Path, texts: list[str], vectors: np.ndarray, asked: np.ndarray) -> dict[str, Any]:
    """Return the same of LlamaIndex's `FaissVectorStore`, which gives places and no texts."""
    shares = share_of(len(texts)).tolist()
    store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(vectors.shape[1]))
    nodes = [
        TextNode(id_=str(n), text=text, metadata={"share": shares[n]}, embedding=vector)
        for n, (text, vector) in enumerate(zip(texts, vectors.tolist(), strict=True))
    ]
    added, _ = timed(lambda: store.add(nodes))
    saved, _ = timed(lambda: store.persist(str(folder / "llama_index.json")))
    loaded, store = timed(lambda: FaissVectorStore.from_persist_path(str(folder / "llama_index.json")))

    def search(n: int, **options: Any) -> Any:
        return store.query(VectorStoreQuery(query_embedding=asked[n].tolist(), similarity_top_k=TOP_K, **options))

    filters = MetadataFilters(filters=[MetadataFilter(key="share", value=SHARE, operator=FilterOperator.LT)])
    return {
        "add_s": added,
        "save_s": saved,
        "load_s": loaded,
        "search": milliseconds(search, len(asked)),
        "filtered": refusal(lambda: search(0, filters=filters)),
        "delete_one": refusal(lambda: store.delete("7")),
    }


def found_on_average(search: Any, count: int) -> float:
    """Return how many documents a search gives on average."""
    return round(float(np.mean([len(search(n)) for n in range(count)])), 1)


def refusal(action: Any) -> str:
    """Return what an action raises, or that it does not."""
    try:
        action()
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "no error"


def main() -> None:
    """Measure all three and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", type=int, default=100)
    arguments = parser.parse_args()
    texts = json.loads((arguments.folder / "texts.json").read_text(encoding="utf-8"))[:N_PASSAGES]
    vectors = np.load(arguments.folder / "vectors.npy", mmap_mode="r")[:N_PASSAGES].copy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.load(arguments.folder / "queries.npz") as arrays:
        asked = arrays["vectors"][: arguments.queries]
    asked = asked / np.linalg.norm(asked, axis=1, keepdims=True)
    packages = ("langchain-community", "llama-index-vector-stores-faiss")
    result: dict[str, Any] = {
        "setting": {
            "passages": len(texts),
            "queries": len(asked),
            "top_k": TOP_K,
            "kept_by_filter": SHARE,
            **conditions(),
            **{name: version(name) for name in packages},
        }
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("FaissStore", ours), ("LangChain", of_langchain), ("LlamaIndex", of_llama_index)):
            found = measure(Path(folder), texts, vectors, asked)
            result[name] = {key: round(one, 4) if isinstance(one, float) else one for key, one in found.items()}
            say(name, result[name])
    result["setting"]["load_after"] = conditions()["load"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
