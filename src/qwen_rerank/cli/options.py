"""Options that several commands share, and the objects that they name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from qwen_rerank.calibration import Calibration
    from qwen_rerank.protocols import Embedder, Scorer

DEFAULT_MODEL = "Qwen/Qwen3-Reranker-0.6B"
DEFAULT_EMBEDDER = "Qwen/Qwen3-Embedding-0.6B"
API_KEY_ENV = "QWEN_RERANK_API_KEY"


def expanded(path: Path) -> Path:
    """Return a path whose `~` is the home folder, where the shell did not see to that: in quotes."""
    return path.expanduser()


def expanded_or_none(path: Path | None) -> Path | None:
    """As `expanded`, for an option that may be left out."""
    return None if path is None else path.expanduser()


StoreArgument = Annotated[Path, typer.Argument(help="A store made by `qwen-rerank index`.", callback=expanded)]
StoreOption = Annotated[
    Path, typer.Option("--store", help="Folder of the store; made if it is not there.", callback=expanded)
]
StoreToRead = Annotated[Path, typer.Option("--store", help="A store made by `qwen-rerank index`.", callback=expanded)]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Reranker: a hub name, a folder, a rerank server's address, 'mini' (small, ships with the package) or 'pocket' (tiny).",
    ),
]
EmbedderName = Annotated[
    str,
    typer.Option("--embedder", "-e", help="First stage: a sentence-transformers name or folder, 'mini' or 'pocket'."),
]
StoredEmbedder = Annotated[str | None, typer.Option("--embedder", "-e", help="The one that the store was built with.")]
Server = Annotated[
    str | None,
    typer.Option("--server", help="A rerank server's address, which is then asked for the model that --model names."),
]
Dialect = Annotated[str, typer.Option("--dialect", help="What the server speaks: auto, vllm, sglang, tei, cohere, …")]
ApiKeyEnv = Annotated[str, typer.Option("--api-key-env", help="Environment variable that holds the server's key.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]
Quantize = Annotated[
    Literal["int8"] | None,
    typer.Option(
        "--quantize", help="int8: 8-bit products on a CPU, with another format's scores; see check --quantize."
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="A file that keeps scores (hashes, never texts), or how many to keep in memory. A hit is faster, so whoever may "
        "ask can find out by timing what was asked before.",
    ),
]
Instruction = Annotated[
    str | None,
    typer.Option(
        "--instruction",
        "-i",
        help="What counts as relevant, in English; the model card's by default.",
        callback=lambda text: text if text and text.strip() else None,  # empty is the default, as over HTTP
    ),
]
LongDocuments = Annotated[
    Literal["truncate", "windows", "error"], typer.Option("--long-documents", help="truncate, windows or error.")
]
Calibrated = Annotated[
    Path | None,
    typer.Option("--calibration", help="A file that `eval calibrate` wrote, for probabilities that mean something."),
]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="Least score of a document that is kept, 0 to 1; all by default.")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Tokens of one prompt, template included; the model's own by default."),
]
TextColumn = Annotated[
    str | None, typer.Option("--text-column", help="Column of tables to read; else text or content, else all.")
]
StoreFilter = Annotated[
    str | None, typer.Option("--filter", help='Only documents whose metadata fit, as JSON: {"year": {"$gte": 2020}}.')
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")]


def read_filter(text: str | None) -> dict[str, Any] | None:
    """Return the filter that an option gives as JSON; the store says what a filter is.

    Raises:
        InvalidInputError: If it is no JSON.
    """
    from qwen_rerank.bounded_json import loads
    from qwen_rerank.errors import InvalidInputError

    if text is None:
        return None
    try:
        found = loads(text.encode())
    except ValueError as exc:
        raise InvalidInputError(
            f'--filter must be JSON such as \'{{"lang": "en"}}\', not {text[:100]!r} ({exc}).'
        ) from exc
    return found  # type: ignore[no-any-return]


def load_scorer(
    model: str,
    *,
    server: str | None = None,
    dialect: str = "auto",
    device: str = "auto",
    max_length: int | None = None,
    quantize: Literal["int8"] | None = None,
    api_key_env: str | None = None,
) -> Scorer:
    """Return the scorer that the options name.

    A server is sent the key that the environment variable holds, and asked for `model` where it is not the default one.
    """
    from qwen_rerank.scorers.loading import load_scorer

    name = server or model
    key = os.environ.get(api_key_env) or None if api_key_env and is_address(name) else None
    served = model if server and model != DEFAULT_MODEL else None
    return load_scorer(
        name, dialect=dialect, device=device, max_length=max_length, quantize=quantize, api_key=key, model=served
    )


def is_address(name: str) -> bool:
    """Return whether this is a server's address and no path."""
    return name.lower().startswith(("http://", "https://"))


def load_stored_embedder(store: Path, given: str | None) -> Embedder | None:
    """Return the embedder that was named, or the one that built the store; None for a store of words alone.

    Raises:
        StoreError: If there is no store, or one that cannot be read.
    """
    from qwen_rerank.embedders import load_embedder
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.store import FaissStore, built_with

    if name := given or built_with(store):
        return load_embedder(name)
    with FaissStore.open(store, None, read_only=True) as opened:
        if opened.dim:
            raise InvalidInputError(f"{store} does not tell its embedder's name; give --embedder.")
    return None


def load_calibration(path: Path | None, threshold: float | None) -> Calibration | None:
    """Return the calibration that the options name; both are checked before a model is loaded."""
    from qwen_rerank.calibration import Calibration
    from qwen_rerank.checks import check_probability

    if threshold is not None:
        check_probability("--threshold", threshold)
    return None if path is None else Calibration.load(path)
