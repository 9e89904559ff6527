"""`qwen-rerank …`: every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import codecs
import io
import sys
from typing import Annotated

import typer

from qwen_rerank import __version__
from qwen_rerank.cli import bulk, check, demo, doctor, folders, mcp, plan, search, serve, store, train
from qwen_rerank.cli import eval as evaluate
from qwen_rerank.errors import RerankError

# What stands for a mark that a console in GBK, cp1252 or ASCII lacks: the first that it has.
_STAND_INS = {
    "✓": "√+", "✗": "×x", "★": "*", "•": "·-", "›": ">", "→": ">", "░": "-", "█": "#", "▲": "^", "▼": "v",
    "…": "~", "–": "-", "—": "-", "━": "-", "“": '"', "”": '"', "‘": "'", "’": "'",
    **dict(zip("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\|/-\\|/", strict=True)),  # the spinner
}  # fmt: skip

app = typer.Typer(
    name="qwen-rerank",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for group in (demo, search, folders, mcp, store, bulk, doctor, serve, plan, check, evaluate, train):
    group.register(app)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwen-rerank {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Two-stage retrieval with Qwen3-Reranker: recall with a first stage, decide with a cross-encoder."""


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Return what is shown for characters that an encoding lacks, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_encodable(_STAND_INS.get(character, ""), error.encoding) for character in lacking), error.end


def _encodable(candidates: str, encoding: str) -> str:
    return next((each for each in candidates if each.encode(encoding, "ignore")), "?")


codecs.register_error("qwen-rerank", _stand_in)


def main() -> None:
    """Run the command line; one of our errors is a sentence on stderr, what helps, and exit status 1."""
    for stream in (sys.stdout, sys.stderr):  # a Windows console in GBK or cp1252 shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="qwen-rerank")
    try:
        app()
    except RerankError as exc:
        print(f"qwen-rerank: {exc}", *getattr(exc, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(1)
