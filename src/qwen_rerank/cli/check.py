"""Commands of `qwen-rerank` for checks of a model or server, and prompt templates."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_rerank.check import Report

_MARKS = {
    "ok": "[green]ok[/]",
    "wrong": "[bold red]wrong[/]",
    "warning": "[yellow]mind[/]",
    "unknown": "[blue]cannot tell[/]",
    "skipped": "[dim]not tried[/]",
}
_VERDICTS = {
    "right": "[bold green]The scores are right.[/]",
    "wrong": "[bold red]The scores cannot be trusted[/]: see {rows}.",
    "cannot tell": "[bold yellow]Cannot tell whether the scores are right:[/] nothing odd was seen, and nothing proves them.",
}


# What asks about scores, and what asks about the cost of a format.
_OF_SCORES = ("reference", "tokenizer", "dialect", "model", "timeout_s", "long_tokens")
_OF_FORMATS = ("collection", "depth", "queries")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("check")(check)
    app.command("template")(template)


def check(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="A server's address, a Qwen3-Reranker's folder or hub name, or 'pocket'.")
    ],
    reference: Annotated[
        str | None, typer.Option(help="Folder or hub name of the served checkpoint; finds out which prompt is made.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Its tokenizer alone, to compare token counts.")] = None,
    dialect: Annotated[str, typer.Option(help="What the server is: vllm, sglang, tei, …; auto asks it.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Model name to ask the server for.")] = None,
    api_key_env: options.ApiKeyEnv = options.API_KEY_ENV,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds of one request.")] = 60.0,
    long_tokens: Annotated[int, typer.Option(help="Longest prompt that is tried, in tokens.")] = 16_384,
    quantize: Annotated[
        Literal["int8"] | None, typer.Option(help="Say instead what this format of a model costs beside float32.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"] | None, typer.Option(help="As --quantize; or with it.")
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(
            help="With them: on these queries, as `eval run` takes them; judged sentences of ours by default."
        ),
    ] = None,
    depth: Annotated[int, typer.Option(help="With them: documents of each query, the first of BM25.")] = 50,
    queries: Annotated[int | None, typer.Option(help="With them: only so many queries.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say whether a server's or model's scores are right, and if not, why and what helps.

    Exit status: 0 the scores are right, 1 they are wrong, 2 nothing odd was seen but nothing proves them. With --quantize
    or --dtype: what the format costs, with status 0.
    """
    _refuse_ignored(context, _OF_SCORES if quantize or dtype else _OF_FORMATS)
    if quantize or dtype:
        _formats(target, quantize, dtype, collection, depth, queries, as_json)
        return
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from rich.console import Console

    from qwen_rerank.check import CheckOptions
    from qwen_rerank.check import check as run

    if not sys.stderr.isatty():
        disable_progress_bars()  # Transformers' too, which asks for this when it is imported
    report = run(
        target,
        CheckOptions(
            reference=reference,
            tokenizer=tokenizer,
            dialect=dialect,
            model=model,
            api_key=os.environ.get(api_key_env) or None,
            timeout_s=timeout_s,
            long_tokens=long_tokens,
        ),
    )
    if as_json:
        from qwen_rerank.cli.show import json_line

        json_line(report.to_dict(), indent=2)
    else:
        _show(report, Console())
    raise typer.Exit(report.exit_code)


def _refuse_ignored(context: typer.Context, names: tuple[str, ...]) -> None:
    """Refuse options that the other kind of check takes, which would do nothing."""
    from qwen_rerank.errors import InvalidInputError

    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = next(one.opts[0] for one in context.command.params if one.name == name)
            goes = "without --quantize and --dtype" if names is _OF_SCORES else "with --quantize or --dtype"
            raise InvalidInputError(f"{option} only goes {goes}; leave it out.")


def _formats(
    target: str,
    quantize: Literal["int8"] | None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None,
    source: str | None,
    depth: int,
    queries: int | None,
    as_json: bool,
) -> None:
    """Print what a format costs."""
    from qwen_rerank.cli import eval_inputs, show
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.evaluation.formats import Format, format_cost, sample_collection

    if "://" in target:
        raise InvalidInputError(
            f"--quantize and --dtype are for a model's folder or name, not for a server ({target})."
        )
    if queries is not None and queries < 2:
        raise InvalidInputError(f"--queries must be at least 2, to compare anything, not {queries}.")
    collection = sample_collection() if source is None else eval_inputs.load(source, "test", queries=queries)
    if source is None and queries is not None:
        collection = collection.head(queries)
    cost = format_cost(target, Format(dtype=dtype or "auto", quantize=quantize), collection, depth=depth)
    if as_json:
        show.json_line(cost.to_dict(), indent=2)
    else:
        show.print_table(show.console, show.format_table(cost))


def template(
    server: Annotated[str, typer.Argument(help="vllm or sglang")],
) -> None:
    r"""Print a correct prompt template for a server: qwen-rerank template vllm > qwen3.jinja.

    vLLM is started with --runner pooling --chat-template qwen3.jinja --hf_overrides '{"architectures":
    \["Qwen3ForSequenceClassification"], "classifier_from_token": \["no","yes"], "is_original_qwen3_reranker": true}';
    SGLang with --chat-template qwen3.jinja and without --is-embedding.
    """
    from qwen_rerank.check.templates import template_text

    # No newline at the end: it would belong to the file, and the file is the prompt.
    sys.stdout.write(template_text(server))


def _show(report: Report, console: Console) -> None:
    """Print the findings of a report as a table, and what they add up to."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(report.target), title_justify="left", show_lines=True, expand=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was seen, what it means, what helps", overflow="fold")
    for finding in report.findings:
        parts = [escape(finding.saw)]
        if finding.why:
            parts.append(f"[italic]{escape(finding.why)}[/]")
        if finding.cure:
            parts.append(f"[bold]→ {escape(finding.cure)}[/]")
        table.add_row(finding.check, _MARKS[finding.status], "\n".join(parts))
    console.print(table)
    rows = ", ".join(finding.check for finding in report.findings if finding.status == "wrong")
    console.print(_VERDICTS[report.verdict].format(rows=rows))
