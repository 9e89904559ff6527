"""A LangChain chain whose retriever reranks: question → 20 candidates → the best 3 → prompt → LLM.

    python examples/langchain_rerank.py
    python examples/langchain_rerank.py --model Qwen/Qwen3-Reranker-0.6B --embedder Qwen/Qwen3-Embedding-0.6B

Needs: pip install 'qwen-rerank[local,faiss-cpu,langchain]'. 'pocket', the default, is a pair of small models for learning; it is
not Qwen3-Reranker.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from qwen_rerank import FaissStore, load_embedder
from qwen_rerank.langchain import QwenRerankRetriever
from qwen_rerank.samples import load_sample

PROMPT = ChatPromptTemplate.from_template("Answer from these notes only:\n\n{notes}\n\nQuestion: {question}")


def main() -> None:
    """Index the shipped texts, and ask a question through a chain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket", help="reranker: a hub name, a folder, or 'pocket'")
    parser.add_argument("--embedder", default="pocket", help="first stage: a sentence-transformers name, or 'pocket'")
    parser.add_argument("--query", default="带猫坐高铁可以吗")
    arguments = parser.parse_args()

    with (
        tempfile.TemporaryDirectory() as folder,
        FaissStore.create(Path(folder, "store"), embedder=load_embedder(arguments.embedder)) as store,
    ):
        store.add(load_sample("zh").documents)

        # k counts the answers, fetch_k the candidates. Any LangChain retriever goes in as base_retriever= instead.
        retriever = QwenRerankRetriever(first_stage=store, model=arguments.model, k=3, fetch_k=20)
        for document in retriever.invoke(arguments.query):
            scores = document.metadata
            print(f"{scores['relevance_score']:.3f} (cosine {scores['retrieval_score']:.3f})  {scores['title']}")

        llm = FakeListChatModel(responses=["(your chat model answers here)"])
        notes = retriever | as_notes
        chain = {"notes": notes, "question": RunnablePassthrough()} | PROMPT | llm | StrOutputParser()
        print(f"\n{PROMPT.format(notes=notes.invoke(arguments.query), question=arguments.query)}")
        print(f"\n{chain.invoke(arguments.query)}")


def as_notes(documents: Sequence[Document]) -> str:
    """Return the documents as text for the prompt, each with its id so that the answer can cite it."""
    return "\n\n".join(f"[{document.id}] {document.page_content}" for document in documents)


if __name__ == "__main__":
    main()
