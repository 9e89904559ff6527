"""`qwen-rerank demo`: both rounds on texts that ship with the package, without a GPU or a model hub."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from qwen_rerank.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(demo)


def demo(
    model: options.Model = "pocket",
    embedder: options.EmbedderName = "pocket",
    query: Annotated[
        str | None, typer.Option("--query", "-q", help="A question of your own, for both collections.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Candidates of the first stage.")] = 20,
    top_n: Annotated[int, typer.Option("--top-n", help="Documents to show.")] = 5,
    device: options.Device = "auto",
) -> None:
    """Search two small collections, Chinese and English, and show what the second round changes."""
    from qwen_rerank.cli.show import console, two_rounds
    from qwen_rerank.embedders import load_embedder
    from qwen_rerank.pipeline import TwoStageRetriever
    from qwen_rerank.reranker import Reranker
    from qwen_rerank.samples import LANGUAGES, load_sample
    from qwen_rerank.store import FaissStore

    console.print(_introduction(model, embedder))
    first_model, reranker = load_embedder(embedder), Reranker(options.load_scorer(model, device=device))
    n_queries, started = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for language in LANGUAGES:
            sample = load_sample(language)
            with FaissStore.create(Path(folder) / language, embedder=first_model) as store:
                store.add(sample.documents)
                retriever = TwoStageRetriever(store, reranker, top_k=top_k, top_n=top_k)
                for text in [query] if query else sample.queries:
                    console.print(two_rounds(text, retriever.retrieve_rounds(text), n_rows=top_n, ids=False), "")
                    n_queries += 1
    console.print(
        f"{n_queries} queries, both rounds, in {time.perf_counter() - started:.1f} s (models already loaded)."
    )
    console.print(_next_steps(model, embedder), highlight=False, markup=False, soft_wrap=True)


def _introduction(model: str, embedder: str) -> str:
    first = f"Round 1 (first stage, 海选): FAISS finds candidates by the embeddings of {embedder}."
    second = f"Round 2 (reranker, 决赛): {model} reads query and document together and puts them in order."
    if model == "pocket":
        second += (
            "\n[yellow]pocket is a few megabytes, trained for learning and tests. It is not Qwen3-Reranker; "
            "for that: qwen-rerank demo --model Qwen/Qwen3-Reranker-0.6B[/]"
        )
    return f"{first}\n{second}\n"


def _next_steps(model: str, embedder: str) -> str:
    return (
        "Your own files:\n"
        f"  qwen-rerank index FOLDER --store my-store --embedder {embedder}\n"
        f'  qwen-rerank search my-store "your question" --model {model}\n'
        "What this machine can run: qwen-rerank doctor"
    )
