"""A LangChain chain whose retriever reranks: question → 20 candidates → the best 3 → prompt → LLM.

    python examples/langchain_rerank.py
    python examples/langchain_rerank.py --model Qwen/Qwen3-Reranker-0.6B --embedder Qwen/Qwen3-Embedding-0.6B

Needs, in a clone: pip install '.[faiss-cpu,langchain]', and the extra `local` for models of the hub. 'mini', the default, is a pair
of small models that ships with the package; it is not Qwen3-Reranker.
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
from qwen_rerank.samples import load_encyclopedia

PROMPT = ChatPromptTemplate.from_template("Answer from these notes only:\n\n{notes}\n\nQuestion: {question}")


def main() -> None:
    """Index the shipped sentences of Wikipedia, and ask a question through a chain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="reranker: a hub name, a folder, or 'mini'")
    parser.add_argument("--embedder", default="mini", help="first stage: a sentence-transformers name, or 'mini'")
    parser.add_argument("--query", default="药房技术员现在的新职责是什么?")
    arguments = parser.parse_args()

    with (
        tempfile.TemporaryDirectory() as folder,
        FaissStore.create(Path(folder, "store"), embedder=load_embedder(arguments.embedder)) as store,
    ):
        store.add(load_encyclopedia("zh").documents)

        # k counts the answers, fetch_k the candidates. Any LangChain retriever goes in as base_retriever= instead.
        retriever = QwenRerankRetriever(first_stage=store, model=arguments.model, k=3, fetch_k=20)
        print(f"{arguments.query}   (reranked by {arguments.model})")
        for document in retriever.invoke(arguments.query):
            scores, text = document.metadata, " · ".join(document.page_content.splitlines())
            print(f"{scores['relevance_score']:.3f} (first stage {scores['retrieval_score']:.3f})  {text:.80}")

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
