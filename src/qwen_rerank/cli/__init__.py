"""`qwen-rerank …`: every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys

import typer

from qwen_rerank.cli import check, doctor, search, serve, train
from qwen_rerank.cli import eval as evaluate
from qwen_rerank.errors import RerankError

app = typer.Typer(
    name="qwen-rerank",
    help="Two-stage retrieval with Qwen3-Reranker: recall with a first stage, decide with a cross-encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (search, doctor, serve, check, evaluate, train):
    group.register(app)


def main() -> None:
    """Run the command line; one of our errors is a sentence on stderr, what helps, and exit status 1."""
    try:
        app()
    except RerankError as exc:
        print(f"qwen-rerank: {exc}", *getattr(exc, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(1)
