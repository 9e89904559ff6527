"""Recall from two real vector databases, through LangChain and LlamaIndex, with the second stage over them.

    python eval/store/external.py --data ../shared/data [--passages 10000] [--queries 40] [--out FILE] [--note TEXT]

Needs: pip install qdrant-client langchain-qdrant lancedb llama-index-vector-stores-lancedb. Qdrant runs in its local mode
(LangChain), LanceDB in a folder (LlamaIndex); both search with and without a filter on the language. The embedder is
`pocket`, so the figures tell of the way through the frameworks and of recall, not of quality.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import Embeddings
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

from eval.speed.measure import hardware
from eval.store.passages import passages, queries
from qwen_rerank import Document, Embedder, Reranker, TwoStageRetriever, load_embedder
from qwen_rerank.langchain import from_langchain
from qwen_rerank.llama_index import from_llama_index
from qwen_rerank.protocols import FirstStage

TOP_K = 20
TOP_N = 5
PACKAGES = ("qdrant-client", "langchain-qdrant", "lancedb", "llama-index-vector-stores-lancedb", "llama-index-core")
Stages = dict[str, FirstStage]  # "all" and "filtered"


class LangChainEmbeddings(Embeddings):
    """An embedder of this package for LangChain."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector for each text."""
        return self._embedder.embed_documents(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Return the query's vector."""
        return self._embedder.embed_queries([text])[0].tolist()


class LlamaIndexEmbedding(BaseEmbedding):
    """An embedder of this package for LlamaIndex."""

    embedder: Any

    def _get_query_embedding(self, query: str) -> list[float]:
        return self.embedder.embed_queries([query])[0].tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.embedder.embed_documents([text])[0].tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self.embedder.embed_documents(texts).tolist()


def qdrant(documents: list[Document], embedder: Embedder, folder: Path, language: str) -> Stages:
    """Return Qdrant in a folder, without a server, through LangChain."""
    from langchain_qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(folder / "qdrant"))
    vectors = models.VectorParams(size=embedder.dim, distance=models.Distance.COSINE)
    client.create_collection("passages", vectors_config=vectors)
    store = QdrantVectorStore(client, "passages", LangChainEmbeddings(embedder))
    store.add_documents(
        [LangChainDocument(page_content=d.text, metadata={**d.metadata, "place": d.id}) for d in documents]
    )
    wanted = models.FieldCondition(key="metadata.language", match=models.MatchValue(value=language))
    options: list[dict[str, Any]] = [{"k": TOP_K}, {"k": TOP_K, "filter": models.Filter(must=[wanted])}]
    every, filtered = (from_langchain(store.as_retriever(search_kwargs=each)) for each in options)
    return {"all": every, "filtered": filtered}


def lancedb(documents: list[Document], embedder: Embedder, folder: Path, language: str) -> Stages:
    """Return LanceDB in a folder through LlamaIndex."""
    from llama_index.vector_stores.lancedb import LanceDBVectorStore

    store = LanceDBVectorStore(uri=str(folder / "lancedb"), table_name="passages")
    index = VectorStoreIndex(
        [
            TextNode(
                id_=f"node-{d.id}",
                text=d.text,
                metadata={**d.metadata, "place": d.id},
                excluded_embed_metadata_keys=[*d.metadata, "place"],  # else they are embedded and read with the text
            )
            for d in documents
        ],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=LlamaIndexEmbedding(embedder=embedder, embed_batch_size=512),
    )
    filters = MetadataFilters(filters=[MetadataFilter(key="language", value=language)])
    return {
        "all": from_llama_index(index.as_retriever(similarity_top_k=TOP_K)),
        "filtered": from_llama_index(index.as_retriever(similarity_top_k=TOP_K, filters=filters)),
    }


DATABASES: dict[str, Callable[[list[Document], Embedder, Path, str], Stages]] = {"qdrant": qdrant, "lancedb": lancedb}


def measure(data: Path, *, n_passages: int, n_queries: int) -> dict[str, Any]:
    """Return recall over the exact answer and the time of both rounds for each database."""
    embedder, reranker = load_embedder("pocket"), Reranker("mini", top_n=TOP_N)
    # Collections come one after the other, so every n-th passage is from all of them.
    texts = passages(data, 10 * n_passages)[::10][:n_passages]
    documents = [
        Document(str(i), text, {"language": "en" if text.isascii() else "other"}) for i, text in enumerate(texts)
    ]
    vectors = embedder.embed_documents(texts)
    has_vector = vectors.any(axis=1)
    documents, vectors = [d for d, one in zip(documents, has_vector) if one], vectors[has_vector]
    asked = [query for query in queries(data, 2 * n_queries) if embedder.embed_queries([query]).any()][:n_queries]
    is_other = np.array([d.metadata["language"] == "other" for d in documents])
    found: dict[str, Any] = {"passages": len(documents), "queries": len(asked), "top_k": TOP_K, "databases": {}}
    for name, build in DATABASES.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            stages = build(documents, embedder, Path(folder), "other")
            figures: dict[str, Any] = {"build_s": round(time.perf_counter() - start, 2)}
            for kind, stage in stages.items():
                allowed = is_other if kind == "filtered" else np.ones(len(documents), bool)
                figures[kind] = rounds(stage, reranker, asked, documents, vectors, allowed, embedder)
            found["databases"][name] = figures
    return found


def rounds(
    stage: FirstStage, reranker: Reranker, asked: list[str], documents: list[Document], vectors: np.ndarray,
    allowed: np.ndarray, embedder: Embedder,
) -> dict[str, Any]:  # fmt: skip
    """Return what both rounds find and take."""
    retriever = TwoStageRetriever(stage, reranker, top_k=TOP_K, top_n=TOP_N)
    places = {document.id: place for place, document in enumerate(documents)}
    recalls, first_ms, both_ms, outside = [], [], [], 0
    for query in asked:
        start = time.perf_counter()
        candidates = stage.search(query, TOP_K)
        middle = time.perf_counter()
        retriever.retrieve_rounds(query)
        both_ms.append(1e3 * (time.perf_counter() - middle))
        first_ms.append(1e3 * (middle - start))
        scores = np.where(allowed, vectors @ embedder.embed_queries([query])[0], -np.inf)
        last = np.sort(scores)[-TOP_K]
        got = [places[candidate.document.metadata["place"]] for candidate in candidates]
        outside += sum(not allowed[place] for place in got)
        recalls.append(sum(scores[place] >= last - 1e-5 for place in got) / TOP_K)  # any of equal ones is right
    return {
        "recall_over_exact": round(statistics.mean(recalls), 4),
        "outside_the_filter": outside,
        "first_round_p50_ms": round(statistics.median(first_ms), 2),
        "both_rounds_p50_ms": round(statistics.median(both_ms), 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of test collections in BEIR layout")
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("external.json"))
    parser.add_argument("--note", default="", help="what else ran on the machine, kept with the figures")
    options = parser.parse_args()
    report = {
        "command": f"python eval/store/external.py --passages {options.passages} --queries {options.queries}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware("cpu"),
        "versions": {name: version(name) for name in PACKAGES},
        "embedder": "pocket",
        "reranker": "mini",
        "note": options.note,
        "figures": measure(options.data, n_passages=options.passages, n_queries=options.queries),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
