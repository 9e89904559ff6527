"""Commands of `qwen-rerank` for the two stages: demo, search, rerank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from qwen_rerank.types import Document


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(search)
    app.command()(rerank)


def search(
    store: options.StoreArgument,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    embedder: options.StoredEmbedder = None,
    model: options.Model = options.DEFAULT_MODEL,
    server: options.Server = None,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    max_length: options.MaxLength = None,
    calibration: options.Calibrated = None,
    threshold: options.Threshold = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Candidates of the first stage.")] = 100,
    top_n: Annotated[int, typer.Option("--top-n", help="Documents after reranking.")] = 10,
    path: Annotated[
        list[str] | None, typer.Option("--path", help="Only files that fit, such as 'notes/*' or '*.md'; repeatable.")
    ] = None,
    suffix: Annotated[list[str] | None, typer.Option("--suffix", help="Only such files, as .pdf; repeatable.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="Only files written on this day or later.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Only files written on this day or before.")] = None,
    context: Annotated[int, typer.Option("-C", "--context", help="Passages before and after each to show.")] = 0,
    as_json: options.Json = False,
    as_files: Annotated[bool, typer.Option("--files", help="Print the files alone, best first.")] = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
) -> None:
    """Search a store in two rounds and show both: first-stage rank, new rank, score, and where each passage stands."""
    from qwen_rerank.cli import show, show_passages
    from qwen_rerank.folders.excerpts import around, file_filter
    from qwen_rerank.pipeline import TwoStageRetriever
    from qwen_rerank.reranker import Reranker
    from qwen_rerank.store import FaissStore

    fitted = options.load_calibration(calibration, threshold)
    first_model = options.load_stored_embedder(store, embedder)
    with FaissStore.open(store, embedder=first_model, read_only=True) as opened:
        wanted = file_filter(opened, paths=path or (), suffixes=suffix or (), since=since, until=until)
        with show.waiting(f"loading {server or model} …"):
            scorer = options.load_scorer(
                model, server=server, dialect=dialect, device=device, max_length=max_length, quantize=quantize
            )
            reranker = Reranker(
                scorer,
                calibration=fitted,
                threshold=threshold,
                instruction=instruction,
                long_documents=long_documents,
                on_error="last",
            )
        # All are ranked: the table also shows where those went that are not among the best.
        retriever = TwoStageRetriever(opened, reranker, top_k=top_k, top_n=top_k)
        with show.waiting(f"searching {len(opened)} passages, reranking up to {min(top_k, len(opened))} …"):
            rounds = retriever.retrieve_rounds(query, filter=wanted)
        hits = [
            show_passages.Answer(hit, rounds.candidates[hit.index].rank, *around(opened, hit.document, context))
            for hit in rounds.ranked[:top_n]
        ]
    if as_json:
        show_passages.as_json(hits)
    elif as_files:
        show_passages.as_files(hits)
    elif as_markdown:
        show_passages.as_markdown(query, hits)
    elif hits and all("part" in one.hit.document.metadata for one in hits):
        show_passages.as_blocks(query, hits, n_candidates=len(rounds.candidates))
    elif hits:
        show.console.print(show.two_rounds(query, rounds, n_rows=top_n))
    if not hits and rounds.candidates:
        show.errors.print(f"None of {len(rounds.candidates)} candidates reaches the threshold of {threshold:g}.")
    elif not hits:
        reason = (
            "no passage of those files" if wanted else f"{store} is empty, or its embedder knows no word of the query"
        )
        show.errors.print(f"Nothing found: {reason}.")


def rerank(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    source: Annotated[list[Path], typer.Argument(help="Files or folders; '-' reads one document a line from stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    server: options.Server = None,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    max_length: options.MaxLength = None,
    calibration: options.Calibrated = None,
    threshold: options.Threshold = None,
    text_column: options.TextColumn = None,
    top_n: Annotated[int, typer.Option("--top-n", help="Documents to show.")] = 10,
    as_json: options.Json = False,
) -> None:
    """Put documents in order of relevance to a query, without a first stage."""
    from qwen_rerank.cli import show
    from qwen_rerank.reranker import Reranker

    fitted = options.load_calibration(calibration, threshold)
    documents = _from_stdin() if source == [Path("-")] else _from_files(source, text_column)
    scorer = options.load_scorer(
        model, server=server, dialect=dialect, device=device, max_length=max_length, quantize=quantize
    )
    reranker = Reranker(
        scorer,
        calibration=fitted,
        threshold=threshold,
        instruction=instruction,
        long_documents=long_documents,
        on_error="last",
    )
    results = reranker.rerank(query, documents, top_n=top_n)
    if as_json:
        show.as_json(results)
    else:
        show.console.print(show.one_round(query, results, n_candidates=len(documents)))


def _from_files(source: list[Path], text_column: str | None) -> list[Document]:
    from qwen_rerank.cli import show
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.folders import read_files

    reading = read_files(source, text_column=text_column)
    show.say(f"{reading.n_files} files, {len(reading.documents)} documents, {len(reading.skipped)} skipped")
    show.left_out(reading.skipped)
    if not reading.documents:
        raise InvalidInputError(
            f"no document found in {', '.join(map(str, source))}; what was left out is listed above."
        )
    return reading.documents


def _from_stdin() -> list[Document]:
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.types import Document

    lines = [Document(f"line {n}", line.rstrip("\n")) for n, line in enumerate(sys.stdin, start=1) if line.strip()]
    if not lines:
        raise InvalidInputError("no document came on stdin; give one a line.")
    return lines
