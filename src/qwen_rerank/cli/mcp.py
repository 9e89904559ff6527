"""`qwen-rerank mcp`: a store for the clients of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_rerank.cli import options

_LEAST_KEY_CHARS = 8
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(mcp)


def mcp(
    *,
    store: options.StoreOption,
    embedder: options.StoredEmbedder = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Candidates of the first stage.")] = 50,
    transport: Annotated[
        Literal["stdio", "http"], typer.Option("--transport", help="stdio, or streamable HTTP at /mcp.")
    ] = ("stdio"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8090,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    api_keys: Annotated[
        str | None, typer.Option("--api-keys", envvar="QWEN_RERANK_API_KEYS", help="Keys, separated by commas.")
    ] = None,
) -> None:
    """Let a language model's client (MCP) search a store, read what it finds and list the files."""
    from qwen_rerank.embedders import load_embedder
    from qwen_rerank.mcp_server import StoreTools, http_app, make_server
    from qwen_rerank.reranker import Reranker
    from qwen_rerank.store import FaissStore, built_with

    keys = _keys(api_keys, api_key_file)
    if transport == "http":
        _check_exposure(host, keys)

    def load() -> Reranker:
        return Reranker(options.load_scorer(model, device=device), on_error="last")

    first_model = load_embedder(embedder or built_with(store) or options.DEFAULT_EMBEDDER)
    with FaissStore.open(store, first_model, read_only=True) as opened:
        server = make_server(StoreTools(opened, load, top_k=top_k))
        if transport == "stdio":
            server.run("stdio")
            return
        import uvicorn

        uvicorn.run(http_app(server, host=host, keys=keys), host=host, port=port, log_level="warning")


def _check_exposure(host: str, keys: list[str]) -> None:
    from qwen_rerank.errors import InvalidInputError

    if host not in _LOOPBACK and not keys:
        raise InvalidInputError(
            f"host ({host!r}) is open to other machines, and no key is set; listen on 127.0.0.1, or give --api-key-file."
        )


def _keys(listed: str | None, file: Path | None) -> list[str]:
    from qwen_rerank.errors import InvalidInputError

    keys = [key.strip() for key in (listed or "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidInputError(f"api_key_file ({str(file)!r}) cannot be read ({exc}).") from exc
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InvalidInputError(f"api_key_file ({str(file)!r}) holds no key; write one a line.")
    if any(len(key) < _LEAST_KEY_CHARS or not key.isascii() for key in keys):
        raise InvalidInputError(f"a key must have at least {_LEAST_KEY_CHARS} characters, all of them ASCII.")
    return keys
