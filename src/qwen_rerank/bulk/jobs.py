"""The jobs that users start: `embed_corpus`, `rerank_pairs`, `rerank_runs`, and `resume_job` by the folder alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from qwen_rerank.bulk.blocks import cut_input
from qwen_rerank.bulk.driver import JobStatus, Workers, open_job, run_job
from qwen_rerank.bulk.job_folder import JobFolder, located
from qwen_rerank.bulk.tasks import EmbedTask, PairsTask, RunsTask
from qwen_rerank.bulk.work import Format
from qwen_rerank.checks import check_choice, check_count, check_text, kind_of
from qwen_rerank.embedders import load_embedder
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.models.names import SHIPPED
from qwen_rerank.protocols import Embedder, Scorer, SimpleScorer
from qwen_rerank.reranker import LongDocuments, Reranker
from qwen_rerank.scorers.loading import load_scorer

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def embed_corpus(
    inputs: Paths,
    output: str | os.PathLike[str],
    *,
    embedder: str | Callable[[], Embedder],
    format: Format = "parquet",
    block_rows: int = 1024,
    workers: Workers | int | None = None,
    filesystem: object = None,
) -> JobStatus:
    """Embed the documents of files into part files; a job that was killed goes on when it is started again.

    A row of input has `text` (or `content`) and may have `id` (or `_id`; else a hash of the text), `title` and more, which
    becomes metadata. A row of output has `id`, `text`, `metadata` (JSON) and `vector` (float32, one length).

    Args:
        inputs: Files or folders of .parquet and .jsonl; local, or addresses that pyarrow or fsspec knows.
        output: The job's folder, which need not exist.
        embedder: A name that `load_embedder` knows, or a function that returns an embedder; called once in each worker.
        format: Of the part files: "parquet" or "jsonl".
        block_rows: Rows of a block: what is embedded together, and what a killed worker has to do again.
        workers: How many on Ray, or `Workers(…)`; None for this process.
        filesystem: Where `inputs` and `output` are, one of pyarrow's or fsspec's; None to tell by the paths.

    Raises:
        InvalidInputError: If an argument is wrong, or `output` is in an input, or holds something else or a job with other
            settings.
        JobError: If another run took the job over, or a worker cannot do its block.
    """
    model = _callable("embedder", embedder)
    folder = JobFolder(*located(output, filesystem))
    given = cut_input(inputs, check_count("block_rows", block_rows), filesystem=filesystem, output=folder)
    task = EmbedTask(model=model, format=_format(format), source=given.filesystem, folder=folder)
    spec = _spec(model, load_embedder)
    return run_job(task, given, block_rows=block_rows, model=spec, workers=_checked(workers))


def rerank_pairs(
    inputs: Paths,
    output: str | os.PathLike[str],
    *,
    scorer: str | Callable[[], Scorer | SimpleScorer],
    instruction: str | None = None,
    format: Format = "parquet",
    block_rows: int = 256,
    workers: Workers | int | None = None,
    filesystem: object = None,
) -> JobStatus:
    """Score pairs of a query and a document; a job that was killed goes on when it is started again.

    A row of input has `query` and `document`, and may have `query_id` and `doc_id`. A row of output has `file` and `row`
    (1-based) of its input, both ids, `log_odds`, `score` (0 to 1), `tokens` and `kept_chars` (-1 where nobody can tell).

    Args:
        inputs: As in `embed_corpus`.
        output: As in `embed_corpus`.
        scorer: A name that `load_scorer` knows, or a function that returns a scorer; called once in each worker.
        instruction: What counts as relevant; None for the scorer's own.
        format: As in `embed_corpus`.
        block_rows: As in `embed_corpus`.
        workers: As in `embed_corpus`.
        filesystem: As in `embed_corpus`.

    Raises:
        InvalidInputError: As `embed_corpus`.
        JobError: As `embed_corpus`.
    """
    model = _callable("scorer", scorer)
    folder = JobFolder(*located(output, filesystem))
    given = cut_input(inputs, check_count("block_rows", block_rows), filesystem=filesystem, output=folder)
    task = PairsTask(
        model=model,
        format=_format(format),
        source=given.filesystem,
        folder=folder,
        instruction=_instruction(instruction),
    )
    spec = _spec(model, load_scorer)
    return run_job(task, given, block_rows=block_rows, model=spec, workers=_checked(workers))


def rerank_runs(
    inputs: Paths,
    output: str | os.PathLike[str],
    *,
    scorer: str | Callable[[], Scorer | SimpleScorer | Reranker],
    instruction: str | None = None,
    top_n: int | None = None,
    long_documents: LongDocuments = "truncate",
    format: Format = "parquet",
    block_rows: int = 16,
    workers: Workers | int | None = None,
    filesystem: object = None,
) -> JobStatus:
    """Rerank the candidates of many queries; a job that was killed goes on when it is started again.

    A row of input has `query_id`, `query` and `candidates`, a list in first-stage order of objects with `text`, and
    optionally `id`, `title` and `score`. A row of output is one ranked document: `query_id`, `doc_id`, `rank` (from 1),
    `score`, `log_odds`, `first_stage_score`, `truncated`.

    Args:
        inputs: As in `embed_corpus`; a row is a query.
        output: As in `embed_corpus`.
        scorer: A name that `load_scorer` knows, or a function that returns a scorer, or a `Reranker` with settings of its
            own; called once in each worker.
        instruction: What counts as relevant; None for the scorer's own.
        top_n: Longest result of a query; None for a `Reranker`'s own, else all candidates.
        long_documents: What happens to a document that does not fit, where `scorer` gives no `Reranker`.
        format: As in `embed_corpus`.
        block_rows: As in `embed_corpus`; queries.
        workers: As in `embed_corpus`.
        filesystem: As in `embed_corpus`.

    Raises:
        InvalidInputError: As `embed_corpus`.
        JobError: As `embed_corpus`.
    """
    model = _callable("scorer", scorer)
    check_choice("long_documents", long_documents, get_args(LongDocuments))
    folder = JobFolder(*located(output, filesystem))
    given = cut_input(inputs, check_count("block_rows", block_rows), filesystem=filesystem, output=folder)
    task = RunsTask(
        model=model,
        format=_format(format),
        source=given.filesystem,
        folder=folder,
        instruction=_instruction(instruction),
        top_n=None if top_n is None else check_count("top_n", top_n),
        long_documents=long_documents,
    )
    spec = _spec(model, load_scorer)
    return run_job(task, given, block_rows=block_rows, model=spec, workers=_checked(workers))


def resume_job(output: str | os.PathLike[str], *, workers: Workers | int | None = None) -> JobStatus:
    """Let a job go on that its folder describes in full: model and input given by names.

    Args:
        output: The job's folder.
        workers: As in `embed_corpus`; they need not be those that began it.

    Raises:
        InvalidInputError: If there is no job, or its model was given as a function or its files by a file system.
        JobError: As `embed_corpus`.
    """
    _, job = open_job(os.fspath(output))
    if not job["given"] or job["model"] is None:
        raise InvalidInputError(
            f"the job in {os.fspath(output)!r} was started with a function or a file system that is written down nowhere; "
            "call what started it again, and it goes on."
        )
    load = load_embedder if job["kind"] == "embed" else load_scorer
    model: Any = partial(load, job["model"]["name"], **job["model"]["options"])
    common = {"format": job["output_format"], "block_rows": job["block_rows"], "workers": workers}
    if job["kind"] == "embed":
        return embed_corpus(job["given"], output, embedder=model, **common)
    if job["kind"] == "pairs":
        return rerank_pairs(job["given"], output, scorer=model, instruction=job["instruction"], **common)
    also = {name: job[name] for name in ("instruction", "top_n", "long_documents")}
    return rerank_runs(job["given"], output, scorer=model, **also, **common)


def _spec(model: Callable[[], object] | str, load: Callable[..., object]) -> dict[str, Any] | None:
    """Return name and options of a model that is loaded by its name; None for anything else, and where a secret is in it.

    A folder's path becomes absolute: the job may go on from elsewhere.
    """
    if isinstance(model, str):
        model = partial(load, model)
    if not isinstance(model, partial) or model.func is not load or len(model.args) != 1:
        return None
    name, options = model.args[0], model.keywords
    if not isinstance(name, str) or not _is_json(options) or "@" in name or "?" in name or "api_key" in options:
        return None
    if name not in SHIPPED and (path := Path(name).expanduser()).is_dir():
        name = str(path.absolute())
    return {"name": name, "options": options}


def _is_json(value: object) -> bool:
    """Return whether a value comes back alike from JSON."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _callable(name: str, model: Any) -> Any:
    loads = callable(model) and (isinstance(model, type) or not isinstance(model, Embedder | SimpleScorer))
    if isinstance(model, str) or loads:
        return model
    raise InvalidInputError(
        f"{name} must be a name or a function that loads the model in each worker, not {kind_of(model)}; give lambda: … of it."
    )


def _checked(workers: object) -> Workers | int | None:
    if workers is None or isinstance(workers, Workers):
        return workers
    return check_count("workers", workers, minimum=0)


def _format(value: Format) -> Format:
    check_choice("format", value, get_args(Format))
    return value


def _instruction(value: str | None) -> str | None:
    return None if value is None else check_text("instruction", value)
