"""Rerank what an existing search system finds: any LangChain retriever, or anything with a search function.

    python examples/over_any_retriever.py

Needs, in a clone: pip install '.[langchain]'. The index here lives in memory; with yours, only the lines that make it change:

    # Qdrant                                                        # Milvus
    from langchain_qdrant import QdrantVectorStore                  from langchain_milvus import Milvus
    vectors = QdrantVectorStore.from_existing_collection(           vectors = Milvus(
        embedding=embeddings, url=URL, collection_name="docs")          embeddings, collection_name="docs",
                                                                        connection_args={"uri": URI})

'mini', the default, is a pair of small models that ships with the package; it is not Qwen3-Reranker.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from qwen_rerank import (
    Candidate,
    Document,
    Embedder,
    FirstStage,
    Reranker,
    TwoStageRetriever,
    load_embedder,
)
from qwen_rerank.langchain import from_langchain
from qwen_rerank.samples import load_encyclopedia


@dataclass
class OurEmbeddings(Embeddings):
    """An embedder of this package for LangChain; an index that you have brings its own."""

    embedder: Embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector for each text."""
        return [list(map(float, row)) for row in self.embedder.embed_documents(texts)]

    def embed_query(self, text: str) -> list[float]:
        """Return the query's vector."""
        return list(map(float, self.embedder.embed_queries([text])[0]))


@dataclass
class CharacterSearch:
    """A search system of your own as a first stage: one method is all it takes, no base class."""

    documents: list[Document]

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return the documents that share the most characters with the query, best first, ranks from 1."""
        wanted = (filter or {}).items()
        documents = [d for d in self.documents if all(d.metadata.get(name) == value for name, value in wanted)]
        shared = [len(set(query) & set(document.text)) for document in documents]
        order = sorted(range(len(shared)), key=shared.__getitem__, reverse=True)[:top_k]
        return [Candidate(documents[i], float(shared[i]), rank) for rank, i in enumerate(order, start=1)]


def main() -> None:
    """Put one reranker behind two search systems that know nothing of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="reranker: a hub name, a folder, or 'mini'")
    parser.add_argument("--embedder", default="mini", help="a sentence-transformers name, or 'mini'")
    parser.add_argument("--query", default="药房技术员现在的新职责是什么?")
    arguments = parser.parse_args()
    documents = load_encyclopedia("zh").documents

    vectors = InMemoryVectorStore(OurEmbeddings(load_embedder(arguments.embedder)))
    vectors.add_documents([LangChainDocument(id=d.id, page_content=d.text) for d in documents])

    reranker = Reranker(arguments.model)
    first_stages: dict[str, FirstStage] = {
        "a LangChain vector store": from_langchain(vectors.as_retriever()),
        "a search system of one's own": CharacterSearch(documents),
    }
    print(f"{arguments.query}   (reranked by {arguments.model})")
    for name, first_stage in first_stages.items():
        print(f"\nover {name}:")
        for hit in TwoStageRetriever(first_stage, reranker, top_k=20, top_n=3).retrieve(arguments.query):
            text = " · ".join(hit.document.text.splitlines())
            print(f"  {hit.rank}. {hit.score:.3f}  was {hit.index + 1:>2}  {text:.60}")


if __name__ == "__main__":
    main()
