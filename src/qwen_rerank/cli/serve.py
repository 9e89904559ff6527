"""`qwen-rerank serve`: the model behind HTTP."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from qwen_rerank.store import FaissStore

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(serve)


def serve(
    model: options.Model = options.DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 takes a free one.")] = 8080,
    kind: Annotated[str | None, typer.Option(hidden=True)] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="A store that the page at / searches.", callback=options.expanded_or_none),
    ] = None,
    embedder: options.StoredEmbedder = None,
    device: options.Device = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    quantize: options.Quantize = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a forward pass on a CPU.")] = None,
    cache: options.Cache = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of one prompt, template included; the model's own by default.")
    ] = None,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    calibration: options.Calibrated = None,
    threshold: options.Threshold = None,
    served_name: Annotated[
        list[str] | None, typer.Option(help="A name that requests may give as `model`; can be repeated.")
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Accept whatever a request gives as `model`.")] = False,
    api_keys: Annotated[
        str | None,
        typer.Option(
            "--api-keys",
            envvar="QWEN_RERANK_API_KEYS",
            help="Keys, separated by commas; better set as the "
            "environment variable, which other users of the machine do not see.",
            show_envvar=True,
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A page's origin that may ask from a browser, such as https://app.example.org; can be repeated."
        ),
    ] = None,
    plain_documents: Annotated[
        bool,
        typer.Option(
            "--plain-documents",
            help="Repeat documents as strings, as Infinity does; for LiteLLM's infinity/NAME at the server's root.",
        ),
    ] = False,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen on other addresses without a key.")] = False,
    max_documents: Annotated[int, typer.Option(help="Documents of one request.")] = 1_000,
    max_queue_wait: Annotated[
        float, typer.Option(help="Seconds a request may expect to wait, else it gets 429.")
    ] = 2.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds to answer a request.")] = 120.0,
    drain_delay: Annotated[
        float, typer.Option(help="Seconds between SIGTERM and closing the port, with readiness red.")
    ] = 0.0,
    grace: Annotated[float, typer.Option(help="Seconds to answer what is admitted, after that.")] = 30.0,
    watchdog: Annotated[float, typer.Option(help="Seconds without progress after which the process ends.")] = 300.0,
    supervise: Annotated[bool, typer.Option("--supervise", help="Start the server again when it dies.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve /v1/rerank and its relatives for any rerank client, and a playground at /."""
    from qwen_rerank.checks import check_choice
    from qwen_rerank.scorers.cached import cache_named
    from qwen_rerank.scorers.loading import check_model, load_scorer
    from qwen_rerank.serve import process, telemetry
    from qwen_rerank.serve.auth import KeyRing, load_keys
    from qwen_rerank.serve.settings import ServeSettings

    if kind is not None:
        typer.echo("--kind is not needed any more and goes away: the model itself says what it is.", err=True)
    kept = cache_named(cache)
    settings = ServeSettings(
        served_names=tuple(served_name or ()),
        any_model=any_model,
        instruction=instruction,
        long_documents=long_documents,
        plain_documents=plain_documents,
        cors_origins=tuple(cors_origin or ()),
        calibration=options.load_calibration(calibration, threshold),
        threshold=threshold,
        max_documents=max_documents,
        max_queue_wait_s=max_queue_wait,
        request_timeout_s=request_timeout,
        drain_delay_s=drain_delay,
        grace_s=grace,
        watchdog_s=watchdog,
    )
    telemetry.configure(level=check_choice("log_level", log_level, ("debug", "info", "warning", "error")).upper())
    keys = load_keys(listed=api_keys, file=api_key_file)
    KeyRing(keys)
    process.check_exposure(host, has_keys=bool(keys), no_auth=no_auth)
    chosen: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "threads": threads,
        "max_length": max_length,
    }
    check_model(model, **chosen)  # before the port is opened: a wrong name should not look like a server that starts
    if supervise and not process.is_child():
        raise typer.Exit(process.supervise(host, port))
    load = partial(load_scorer, model, **chosen, cache=kept)
    with ExitStack() as stack:
        first_stage = None if store is None else stack.enter_context(_opened(store, embedder))
        process.serve(
            load,
            host=host,
            port=port,
            first_stage=first_stage,
            settings=settings,
            api_keys=keys,
            no_auth=no_auth,
            listener=process.inherited_listener(),
        )


def _opened(store: Path, embedder: str | None) -> FaissStore:
    from qwen_rerank.store import FaissStore

    return FaissStore.open(store, options.load_stored_embedder(store, embedder), read_only=True)
