"""`qwen-rerank mcp`: a store for the clients of language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_rerank.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(mcp)


def mcp(
    *,
    store: options.StoreToRead,
    embedder: options.StoredEmbedder = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Candidates of the first stage.")] = 50,
    transport: Annotated[
        Literal["stdio", "http"], typer.Option("--transport", help="stdio, or streamable HTTP at /mcp.")
    ] = "stdio",
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8090,
    api_keys: Annotated[
        str | None, typer.Option("--api-keys", envvar="QWEN_RERANK_API_KEYS", help="Keys, separated by commas.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
) -> None:
    """Let a language model's client (MCP) search a store, read what it finds and list the files."""
    from qwen_rerank.mcp_server import StoreTools, http_app, make_server
    from qwen_rerank.reranker import Reranker
    from qwen_rerank.store import FaissStore

    allows = _allows(host, api_keys, api_key_file) if transport == "http" else None
    first_model = options.load_stored_embedder(store, embedder)

    def load() -> Reranker:
        return Reranker(options.load_scorer(model, device=device), on_error="last")

    with FaissStore.open(store, first_model, read_only=True) as opened:
        server = make_server(StoreTools(opened, load, top_k=top_k))
        if transport == "stdio":
            server.run("stdio")
            return
        import uvicorn

        from qwen_rerank.cli.show import errors
        from qwen_rerank.serve.process import listen

        listener = listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        errors.print(f"MCP at http://{shown}:{port}/mcp; Ctrl-C ends it", highlight=False, markup=False)
        config = uvicorn.Config(http_app(server, host=host, allows=allows), log_level="warning")
        uvicorn.Server(config).run(sockets=[listener])


def _allows(host: str, listed: str | None, file: Path | None) -> Callable[[Sequence[tuple[bytes, bytes]]], bool] | None:
    """Return what says whether a request's headers carry one of the keys; None where none is needed."""
    from qwen_rerank.serve.auth import KeyRing, load_keys
    from qwen_rerank.serve.errors import ApiError
    from qwen_rerank.serve.process import check_exposure

    ring = KeyRing(load_keys(listed=listed, file=file))
    check_exposure(host, has_keys=bool(len(ring)), no_auth=False)
    if not len(ring):
        return None

    def allows(headers: Sequence[tuple[bytes, bytes]]) -> bool:
        try:
            ring.identify(headers)
        except ApiError:
            return False
        return True

    return allows
