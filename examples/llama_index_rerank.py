"""A LlamaIndex query engine with a reranker: 20 nodes out of the index, the best 3 into the answer.

    python examples/llama_index_rerank.py
    python examples/llama_index_rerank.py --model Qwen/Qwen3-Reranker-0.6B --embedder Qwen/Qwen3-Embedding-0.6B

Needs, in a clone: pip install '.[llama-index]', and the extra `local` for models of the hub. 'mini', the default, is a pair of small
models that ships with the package; it is not Qwen3-Reranker.
"""

from __future__ import annotations

import argparse

from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode
from pydantic import PrivateAttr

from qwen_rerank import Embedder, load_embedder
from qwen_rerank.llama_index import QwenRerankPostprocessor
from qwen_rerank.samples import load_encyclopedia


class OurEmbedding(BaseEmbedding):
    """An embedder of this package as a LlamaIndex embedding; an index that you have brings its own."""

    _embedder: Embedder = PrivateAttr()

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self._embedder = embedder

    def _get_query_embedding(self, query: str) -> list[float]:
        return list(map(float, self._embedder.embed_queries([query])[0]))

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return list(map(float, self._embedder.embed_documents([text])[0]))


def main() -> None:
    """Index the shipped sentences of Wikipedia, and ask a question through a query engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="reranker: a hub name, a folder, or 'mini'")
    parser.add_argument("--embedder", default="mini", help="a sentence-transformers name, or 'mini'")
    parser.add_argument("--query", default="What magnetic and electric force acts on a charge?")
    arguments = parser.parse_args()

    nodes = [TextNode(id_=document.id, text=document.text) for document in load_encyclopedia("en").documents]
    index = VectorStoreIndex(nodes, embed_model=OurEmbedding(load_embedder(arguments.embedder)))
    rerank = QwenRerankPostprocessor(model=arguments.model, top_n=3, keep_retrieval_score=True)
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=20, node_postprocessors=[rerank])

    print(f"{arguments.query}   (reranked by {arguments.model})\n")
    for found in engine.query(arguments.query).source_nodes:
        before = found.node.metadata["retrieval_score"]
        print(f"{found.score:.3f} (cosine {before:.3f})  {' · '.join(found.text.splitlines()):.90}")


if __name__ == "__main__":
    main()
