"""Commands of `qwen-rerank` for the two stages: demo, search, rerank."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_rerank.cli import options
from qwen_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from qwen_rerank.types import Document


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(search)
    app.command()(rerank)


def search(
    ctx: typer.Context,
    store: Annotated[
        str,
        typer.Argument(help="A store made by `qwen-rerank index`, or the address of a running `serve --store`."),
    ],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    embedder: options.StoredEmbedder = None,
    model: options.Model = options.DEFAULT_MODEL,
    server: options.Server = None,
    dialect: options.Dialect = "auto",
    api_key_env: options.ApiKeyEnv = options.API_KEY_ENV,
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    max_length: options.MaxLength = None,
    calibration: options.Calibrated = None,
    threshold: options.Threshold = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Candidates of the first stage.")] = 100,
    top_n: Annotated[int, typer.Option("--top-n", min=1, help="Documents after reranking.")] = 10,
    path: Annotated[
        list[str] | None, typer.Option("--path", help="Only files that fit, such as 'notes/*' or '*.md'; repeatable.")
    ] = None,
    suffix: Annotated[list[str] | None, typer.Option("--suffix", help="Only such files, as .pdf; repeatable.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="Only files written on this day or later.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Only files written on this day or before.")] = None,
    filter: options.StoreFilter = None,
    context: Annotated[
        int, typer.Option("-C", "--context", min=0, max=100, help="Passages before and after each to show.")
    ] = 0,
    as_json: options.Json = False,
    as_files: Annotated[bool, typer.Option("--files", help="Print the files alone, best first.")] = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
) -> None:
    """Search a store in two rounds and show both: first-stage rank, new rank, score, and where each passage stands.

    With the address of a running `qwen-rerank serve --store` nothing is loaded here: that server searches its store.
    """
    from qwen_rerank.cli import show, show_passages
    from qwen_rerank.pipeline import TwoStageRetriever
    from qwen_rerank.reranker import Reranker

    fitted = options.load_calibration(calibration, threshold)
    if options.is_address(store):
        _check_warm(ctx)
        from qwen_rerank.cli import warm_search

        wanted: dict[str, Any] = {
            "query": query, "instruction": instruction, "top_k": top_k, "top_n": top_n, "threshold": threshold,
            "paths": path or None, "suffixes": suffix or None, "since": since, "until": until, "context": context,
            "long_documents": long_documents if _is_given(ctx, "long_documents") else None,
        }  # fmt: skip
        with show.waiting("the server searches …"):
            rounds, hits = warm_search.ask(store, wanted, api_key=os.environ.get(api_key_env) or None)
        is_filtered, where = bool(path or suffix or since or until), "the server's store"
    else:
        from qwen_rerank.folders.excerpts import around, file_filter
        from qwen_rerank.store import FaissStore

        folder = options.expanded(Path(store))
        first_model = options.load_stored_embedder(folder, embedder)
        with FaissStore.open(folder, embedder=first_model, read_only=True) as opened:
            files = file_filter(opened, paths=path or (), suffixes=suffix or (), since=since, until=until)
            conditions = [one for one in (files, options.read_filter(filter)) if one is not None]
            kept = {"$and": conditions} if len(conditions) == 2 else next(iter(conditions), None)
            with show.waiting(f"loading {server or model} …"):
                scorer = options.load_scorer(
                    model,
                    server=server,
                    dialect=dialect,
                    device=device,
                    max_length=max_length,
                    quantize=quantize,
                    api_key_env=api_key_env,
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
            with show.waiting(
                f"searching {show.counted(len(opened), 'passage')}, reranking up to {min(top_k, len(opened))} …"
            ):
                rounds = retriever.retrieve_rounds(query, filter=kept)
            hits = [
                show_passages.Answer(hit, rounds.candidates[hit.index].rank, *around(opened, hit.document, context))
                for hit in rounds.ranked[:top_n]
            ]
        is_filtered, where = kept is not None, str(folder)
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
        least = "of the server" if threshold is None else f"of {threshold:g}"
        show.errors.print(f"None of {len(rounds.candidates)} candidates reaches the threshold {least}.")
    elif not hits:
        reason = (
            "no passage fits what --path, --filter and the like ask for"
            if is_filtered
            else f"{where} is empty, or its embedder knows no word of the query"
        )
        show.errors.print(f"Nothing found: {reason}.")


_LOADED_HERE = ("embedder", "model", "server", "dialect", "device", "quantize", "max_length", "calibration")


def _check_warm(ctx: typer.Context) -> None:
    """Refuse options that say what is loaded here, where nothing is.

    Raises:
        InvalidInputError: With the first of them.
    """
    if _is_given(ctx, "filter"):
        raise InvalidInputError(
            "--filter is for a store on this machine; with a server choose by --path, --suffix, --since and --until."
        )
    if given := next((name for name in _LOADED_HERE if _is_given(ctx, name)), None):
        option = f"--{given.replace('_', '-')}"
        raise InvalidInputError(f"{option} is for a store on this machine; the server has its own: leave {option} out.")


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def rerank(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    source: Annotated[list[Path], typer.Argument(help="Files or folders; '-' reads one document a line from stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    server: options.Server = None,
    dialect: options.Dialect = "auto",
    api_key_env: options.ApiKeyEnv = options.API_KEY_ENV,
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    max_length: options.MaxLength = None,
    calibration: options.Calibrated = None,
    threshold: options.Threshold = None,
    text_column: options.TextColumn = None,
    top_n: Annotated[int, typer.Option("--top-n", min=1, help="Documents to show.")] = 10,
    as_json: options.Json = False,
) -> None:
    """Put documents in order of relevance to a query, without a first stage."""
    from qwen_rerank.cli import show
    from qwen_rerank.reranker import Reranker

    fitted = options.load_calibration(calibration, threshold)
    documents = _from_stdin() if source == [Path("-")] else _from_files(source, text_column)
    with show.waiting(f"loading {server or model} …"):
        scorer = options.load_scorer(
            model,
            server=server,
            dialect=dialect,
            device=device,
            max_length=max_length,
            quantize=quantize,
            api_key_env=api_key_env,
        )
    reranker = Reranker(
        scorer,
        calibration=fitted,
        threshold=threshold,
        instruction=instruction,
        long_documents=long_documents,
        on_error="last",
    )
    with show.waiting(f"reranking {show.counted(len(documents), 'document')} …"):
        results = reranker.rerank(query, documents, top_n=top_n)
    if as_json:
        show.as_json(results)
    else:
        show.console.print(show.one_round(query, results, n_candidates=len(documents)))


def _from_files(source: list[Path], text_column: str | None) -> list[Document]:
    from qwen_rerank.cli import show
    from qwen_rerank.folders import read_files

    reading = read_files(source, text_column=text_column)
    files, documents = show.counted(reading.n_files, "file"), show.counted(len(reading.documents), "document")
    show.say(f"{files}, {documents}, {len(reading.skipped)} skipped")
    show.left_out(reading.skipped)
    if not reading.documents:
        raise InvalidInputError(
            f"no document found in {', '.join(map(str, source))}; what was left out is listed above."
        )
    return reading.documents


def _from_stdin() -> list[Document]:
    from qwen_rerank.types import Document

    lines = [Document(f"line {n}", line.rstrip("\n")) for n, line in enumerate(sys.stdin, start=1) if line.strip()]
    if not lines:
        raise InvalidInputError("no document came on stdin; give one a line.")
    return lines
