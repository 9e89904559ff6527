"""`qwen-rerank bulk …`: embed or rerank whole data sets, on this machine or on Ray, and go on after a kill."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from qwen_rerank.bulk import JobStatus, Workers

app = typer.Typer(help="Embed or rerank whole data sets; a job that was killed goes on.", no_args_is_help=True)

Inputs = Annotated[list[str], typer.Argument(help=".parquet and .jsonl files, folders of them, or addresses (s3://…).")]
Output = Annotated[str, typer.Option("--output", "-o", help="The job's folder, or its address.")]
OutputArgument = Annotated[str, typer.Argument(metavar="OUTPUT", help="The job's folder, or its address.")]
PartFormat = Annotated[Literal["parquet", "jsonl"], typer.Option("--format", help="Of the part files.")]
BlockRows = Annotated[
    int | None, typer.Option("--block-rows", min=1, help="Rows of a block, which is done or not done as a whole.")
]
Count = Annotated[int, typer.Option("--workers", min=0, help="Workers on Ray; 0 is this process, without Ray.")]
Gpus = Annotated[float, typer.Option("--gpus-per-worker", min=0, help="GPUs of each worker; 0.5 puts two on one.")]
Cpus = Annotated[float, typer.Option("--cpus-per-worker", min=0, help="Cores of each worker.")]
Retries = Annotated[int, typer.Option("--retries", min=0, help="How often a block whose worker died is done again.")]
Address = Annotated[
    str | None, typer.Option("--ray-address", help="A Ray cluster; by default the environment's, else a local one.")
]


def register(parent: typer.Typer) -> None:
    """Add the commands to `parent`."""
    parent.add_typer(app, name="bulk")


@app.command()
def embed(
    inputs: Inputs,
    output: Output,
    embedder: options.EmbedderName = options.DEFAULT_EMBEDDER,
    device: options.Device = "auto",
    format: PartFormat = "parquet",
    block_rows: BlockRows = None,
    workers: Count = 0,
    gpus: Gpus = 0,
    cpus: Cpus = 1,
    retries: Retries = 3,
    address: Address = None,
) -> None:
    """Embed documents: rows with text, and optionally id, title and more."""
    from qwen_rerank.bulk import embed_corpus
    from qwen_rerank.embedders import load_embedder

    model = partial(load_embedder, embedder, device=device)
    pool = _workers(workers, gpus, cpus, retries, address)
    _report(embed_corpus(inputs, output, embedder=model, format=format, block_rows=block_rows or 1024, workers=pool))


@app.command()
def rerank(
    inputs: Inputs,
    output: Output,
    model: options.Model = options.DEFAULT_MODEL,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Rows are pairs, query and document, in place of queries with candidates.")
    ] = False,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="auto, bfloat16, float16 or float32.")
    ] = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Scores that depend on nothing else in a batch; slower.")
    ] = False,
    max_length: options.MaxLength = None,
    instruction: options.Instruction = None,
    top_n: Annotated[
        int | None, typer.Option("--top-n", min=1, help="Longest result of a query; all by default.")
    ] = None,
    long_documents: options.LongDocuments = "truncate",
    format: PartFormat = "parquet",
    block_rows: BlockRows = None,
    workers: Count = 0,
    gpus: Gpus = 0,
    cpus: Cpus = 1,
    retries: Retries = 3,
    address: Address = None,
) -> None:
    """Rerank the candidates of queries (rows with query_id, query, candidates), or score pairs."""
    from qwen_rerank.bulk import rerank_pairs, rerank_runs
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.scorers.loading import load_scorer

    given = {
        "dialect": dialect,
        "device": device,
        "dtype": dtype,
        "deterministic": deterministic,
        "max_length": max_length,
    }
    wanted = {name: value for name, value in given.items() if value not in ("auto", False, None)}
    scorer = partial(load_scorer, model, **wanted)  # type: ignore[arg-type]  # typer has checked the choices
    pool = _workers(workers, gpus, cpus, retries, address)
    if not pairs:
        status = rerank_runs(
            inputs,
            output,
            scorer=scorer,
            instruction=instruction,
            top_n=top_n,
            long_documents=long_documents,
            format=format,
            block_rows=block_rows or 16,
            workers=pool,
        )
    elif top_n is not None or long_documents != "truncate":
        raise InvalidInputError("--pairs takes neither --top-n nor --long-documents; every pair gets its score.")
    else:
        rows = block_rows or 256
        status = rerank_pairs(
            inputs, output, scorer=scorer, instruction=instruction, format=format, block_rows=rows, workers=pool
        )
    _report(status)


@app.command()
def resume(
    output: OutputArgument,
    workers: Count = 0,
    gpus: Gpus = 0,
    cpus: Cpus = 1,
    retries: Retries = 3,
    address: Address = None,
) -> None:
    """Let a job go on that was killed or stopped, with the settings that it began with."""
    from qwen_rerank.bulk import resume_job

    _report(resume_job(output, workers=_workers(workers, gpus, cpus, retries, address)))


@app.command()
def status(output: OutputArgument, as_json: options.Json = False) -> None:
    """Show how far a job is, while it runs or after."""
    from qwen_rerank.bulk import job_status

    found = job_status(output)
    if as_json:
        from qwen_rerank.cli.show import json_line

        json_line({**asdict(found), "complete": found.complete})
        return
    for name, value in asdict(found).items():
        print(f"{name:<12} {value}")
    print(f"{'complete':<12} {'yes' if found.complete else 'no'}")


def _workers(count: int, gpus: float, cpus: float, retries: int, address: str | None) -> Workers | None:
    from qwen_rerank.bulk import Workers
    from qwen_rerank.errors import InvalidInputError

    if not count and (gpus, cpus, retries, address) != (0, 1, 3, None):
        raise InvalidInputError(
            "--gpus-per-worker, --cpus-per-worker, --retries and --ray-address are for workers on Ray; give --workers too."
        )
    return Workers(count=count, cpus=cpus, gpus=gpus, retries=retries, address=address) if count else None


def _report(status: JobStatus) -> None:
    from qwen_rerank.cli.show import say

    refused = f"; {status.rejects} refused, see {status.output}/rejects" if status.rejects else ""
    # A query gives as many rows as it has candidates; of a document or a pair comes one.
    read = f"for {status.rows_in} queries" if status.kind == "runs" else f"of {status.rows_in}"
    say(f"{status.rows} rows {read} are in {status.output}/parts{refused}.")
