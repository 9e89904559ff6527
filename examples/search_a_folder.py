"""Search a folder of .txt, .md, .jsonl and .csv files by meaning, in two stages.

    python examples/search_a_folder.py                                    # the texts that ship with the package
    python examples/search_a_folder.py ~/notes "when does the lease end" --store ~/notes-store
    python examples/search_a_folder.py ~/notes "…" --model Qwen/Qwen3-Reranker-0.6B --embedder Qwen/Qwen3-Embedding-0.6B

With --store the index is kept, and the next run embeds only what is new. 'pocket', the default, is a pair of small models for
learning; it is not Qwen3-Reranker.

Needs: pip install 'qwen-rerank[local,faiss-cpu]'.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from qwen_rerank import Document, FaissStore, Reranker, TwoStageRetriever, load_embedder
from qwen_rerank.documents import read_documents
from qwen_rerank.samples import load_sample


def main() -> None:
    """Read the folder, bring the store up to date, search, rerank, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="files to search; without one, the shipped texts")
    parser.add_argument("query", nargs="?", default="why does my bread come out heavy and dense")
    parser.add_argument("--store", type=Path, help="where the index is kept; without one it is made for this run only")
    parser.add_argument("--model", default="pocket", help="reranker: a hub name, a folder, or 'pocket'")
    parser.add_argument("--embedder", default="pocket", help="first stage: a sentence-transformers name, or 'pocket'")
    parser.add_argument("--top-k", type=int, default=20, help="candidates of the first stage")
    parser.add_argument("--top-n", type=int, default=5, help="results to print")
    arguments = parser.parse_args()

    documents = load_documents(arguments.folder)
    with (
        tempfile.TemporaryDirectory() as temporary,
        open_store(arguments.store or Path(temporary, "store"), arguments.embedder) as store,
    ):
        n_new = update(store, documents)
        print(f"{len(store)} documents in the store, {n_new} of them new or changed")
        retriever = TwoStageRetriever(store, Reranker(arguments.model), top_k=arguments.top_k)
        print(f"\n{arguments.query}\n")
        for hit in retriever.retrieve(arguments.query, top_n=arguments.top_n):
            first_line = hit.document.text.splitlines()[0]
            print(f"{hit.rank}. P={hit.score:.3f}  was {hit.index + 1:>2}  {hit.document.id}: {first_line:.60}")


def load_documents(folder: Path | None) -> list[Document]:
    """Return the folder's documents, or the shipped ones; what cannot be read is named."""
    if folder is None:
        return [document for language in ("zh", "en") for document in load_sample(language).documents]
    reading = read_documents([folder])
    for skipped in reading.skipped:
        print(f"skipped {skipped.where}: {skipped.reason}")
    return reading.documents


def open_store(path: Path, embedder: str) -> FaissStore:
    """Return the store at `path`, made if it is not there."""
    if path.exists():
        return FaissStore.open(path, embedder=load_embedder(embedder))
    return FaissStore.create(path, embedder=load_embedder(embedder))


def update(store: FaissStore, documents: list[Document]) -> int:
    """Store what is new or changed, and return how many documents that were."""
    there = {document.id: document.text for document in store.get([document.id for document in documents])}
    changed = [document for document in documents if there.get(document.id) != document.text]
    store.upsert(changed)
    return len(changed)


if __name__ == "__main__":
    main()
