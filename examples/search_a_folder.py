"""Search a folder of real files (Markdown, PDF, Word, slides, sheets, HTML, code, …) by meaning, in two stages.

    python examples/search_a_folder.py                                    # the texts that ship with the package, as files
    python examples/search_a_folder.py ~/notes "when does the lease end" --store ~/notes-store
    python examples/search_a_folder.py ~/notes "…" --model Qwen/Qwen3-Reranker-0.6B --embedder Qwen/Qwen3-Embedding-0.6B

With --store the index is kept, and the next run embeds only what is new or changed, and forgets what vanished. The same from a
terminal: `qwen-rerank index ~/notes --store ~/notes-store`, then `qwen-rerank search ~/notes-store "when does the lease end"`.

Needs, in a clone: pip install '.[faiss-cpu,files]'.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from qwen_rerank import FaissStore, Reranker, TwoStageRetriever, load_embedder
from qwen_rerank.folders import sync_folder
from qwen_rerank.samples import load_sample


def main() -> None:
    """Bring the store in step with the folder, search, rerank, print each passage with its place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="files to search; without one, the shipped texts")
    parser.add_argument("query", nargs="?", default="面包为什么又硬又重")
    parser.add_argument("--store", type=Path, help="where the index is kept; without one it is made for this run only")
    parser.add_argument("--model", default="mini", help="reranker: a hub name, a folder, 'mini' or 'pocket'")
    parser.add_argument("--embedder", default="mini", help="first stage: a hub name, a folder, 'mini' or 'pocket'")
    parser.add_argument("--top-k", type=int, default=20, help="candidates of the first stage")
    parser.add_argument("--top-n", type=int, default=5, help="results to print")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or write_samples(Path(temporary, "articles"))
        path = arguments.store or Path(temporary, "store")
        with FaissStore.open_or_create(path, load_embedder(arguments.embedder)) as store:
            report = sync_folder(store, [folder])
            for skipped in report.skipped:
                print(f"skipped {skipped.where}: {skipped.reason}")
            print(f"{len(store)} passages in the store, {report.embedded} of them new or changed")
            search(store, arguments)


def search(store: FaissStore, arguments: argparse.Namespace) -> None:
    """Print the best passages, each with its file, line or page, and heading."""
    retriever = TwoStageRetriever(store, Reranker(arguments.model), top_k=arguments.top_k)
    print(f"\n{arguments.query}   (reranked by {arguments.model})\n")
    for hit in retriever.retrieve(arguments.query, top_n=arguments.top_n):
        data = hit.document.metadata
        place = f"{data['source']}:{data['line']}" if "line" in data else f"{data['source']} {data.get('page', '')}"
        print(f"{hit.rank}. score {hit.score:.3f}  was {hit.index + 1:>2}  {place}  {data['heading']}")


def write_samples(folder: Path) -> Path:
    """Write the texts that ship with the package as Markdown files, named by their titles, and return the folder."""
    folder.mkdir()
    for language in ("zh", "en"):
        for document in load_sample(language).documents:
            title, body = document.text.split("\n", 1)
            (folder / f"{title.replace('/', '-')}.md").write_text(f"# {title}\n\n{body}\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
