"""The server as a deployment on Ray Serve: `serve run qwen_rerank.serve.ray:app model=NAME`.

The answers are those of `qwen-rerank serve`. Connections belong to Ray's proxy: the plain server's limits on them (slow
clients, request heads, open connections) are Ray's to keep here, all others hold in every replica.
"""

# Annotations are classes here, not texts: Ray makes the arguments of what `app` is annotated with.
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from qwen_rerank.calibration import Calibration
from qwen_rerank.errors import InvalidInputError, MissingExtraError, ScorerError
from qwen_rerank.reranker import LongDocuments
from qwen_rerank.scorers.cached import cache_named
from qwen_rerank.scorers.loading import check_model, load_scorer
from qwen_rerank.serve.app import create_app
from qwen_rerank.serve.auth import KeyRing, load_keys
from qwen_rerank.serve.backend import Backend, State
from qwen_rerank.serve.settings import ServeSettings

# Before Ray is imported: a server sends nothing about itself to anybody unless its user asks for that.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    from ray import serve
    from ray.serve import Application
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.serve.ray", package="ray", extra="ray", cause=exc) from exc

_HEALTH_PERIOD_S = 5.0


class RayServeArguments(BaseModel):
    """Arguments of `serve run qwen_rerank.serve.ray:app`, or of `args:` in a configuration file of Ray Serve.

    Keys come from the environment variable QWEN_RERANK_API_KEYS, as for the plain server, or from a file.

    Attributes:
        model: As in `qwen-rerank serve`, and so all others up to `watchdog`.
        replicas: Servers, each with the model; the fewest where `max_replicas` is given.
        max_replicas: The most, when Ray adds and removes them by load; None for a fixed number.
        target_requests: Requests under way in a replica at which Ray adds another.
        gpus: GPUs of each replica; 0.5 puts two on one.
        cpus: Cores of each replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "Qwen/Qwen3-Reranker-0.6B"
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantize: Literal["int8"] | None = None
    deterministic: bool = False
    threads: PositiveInt | None = None
    cache: str | None = None
    max_length: PositiveInt | None = None
    instruction: str | None = None
    long_documents: LongDocuments = "truncate"
    calibration: Path | None = None
    threshold: float | None = None
    served_name: str | None = None
    any_model: bool = False
    api_key_file: Path | None = None
    no_auth: bool = False
    max_documents: int = 1_000
    max_queue_wait: float = 2.0
    request_timeout: float = 120.0
    grace: float = 30.0
    watchdog: float = 300.0
    replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = None
    target_requests: float = Field(default=8.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    cpus: float = Field(default=1.0, ge=0)

    def settings(self) -> ServeSettings:
        """Return the settings of each replica's server."""
        return ServeSettings(
            served_names=tuple(filter(None, (self.served_name or "").split(","))),
            any_model=self.any_model,
            instruction=self.instruction,
            long_documents=self.long_documents,
            calibration=None if self.calibration is None else Calibration.load(self.calibration),
            threshold=self.threshold,
            max_documents=self.max_documents,
            max_queue_wait_s=self.max_queue_wait,
            request_timeout_s=self.request_timeout,
            grace_s=self.grace,
            watchdog_s=self.watchdog,
        )


class Replica:
    """A server with its model; made where it runs.

    Args:
        arguments: As they were given.
        settings: Its limits.
        keys: Keys that open it.
    """

    def __init__(self, arguments: RayServeArguments, settings: ServeSettings, keys: list[str]) -> None:
        load = partial(
            load_scorer,
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            deterministic=arguments.deterministic,
            threads=arguments.threads,
            max_length=arguments.max_length,
            cache=cache_named(arguments.cache),
        )
        self._settings = settings
        self._app = create_app(load=load, settings=settings, api_keys=keys)
        self._backend: Backend = self._app.state.backend

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name that Ray Serve looks for
        """Return the server."""
        return self._app

    async def check_health(self) -> None:
        """Answer Ray once the model is loaded and checked: only then are requests sent here, and an older replica ends.

        Raises:
            ScorerError: If it cannot be served, or does not move; Ray starts another replica in place of this one.
        """
        await self._backend.wait_loaded()
        if self._backend.queue.stalled_s >= self._settings.watchdog_s:
            self._backend.enter(State.STALLED, "the model hangs")
        if self._backend.state in (State.FAILED, State.STALLED):
            raise ScorerError(f"{self._backend.reason}.")


def app(arguments: RayServeArguments) -> Application:
    """Return the server as an application of Ray Serve.

    Raises:
        InvalidInputError: If it would be open without a key, or an argument is wrong.
        ModelError: If the model cannot be used.
    """
    settings = arguments.settings()
    keys = load_keys(listed=os.environ.get("QWEN_RERANK_API_KEYS"), file=arguments.api_key_file)
    KeyRing(keys)
    if not keys and not arguments.no_auth:
        raise InvalidInputError(
            "Ray decides where its proxies listen, and no API key is set; give keys (QWEN_RERANK_API_KEYS or api_key_file=…), "
            "or say no_auth=true if only this machine, or something in front that asks for keys, can reach them."
        )
    check_model(arguments.model)  # here, where it is a sentence, and not a replica that starts again and again
    make: Any = serve.deployment(
        name="qwen-rerank",
        # The server itself refuses what would wait too long; Ray's own limit of five would hold requests back before it.
        max_ongoing_requests=2 * settings.max_queued_requests,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=max(30.0, arguments.watchdog),
        graceful_shutdown_timeout_s=arguments.grace,
        **_size(arguments),
    )
    application: Application = make(serve.ingress()(Replica)).bind(arguments, settings, keys)
    return application


def _size(arguments: RayServeArguments) -> dict[str, Any]:
    if arguments.max_replicas is None:
        return {"num_replicas": arguments.replicas}
    if arguments.max_replicas < arguments.replicas:
        raise InvalidInputError(
            f"max_replicas ({arguments.max_replicas}) must be at least replicas ({arguments.replicas})."
        )
    bounds = {"min_replicas": arguments.replicas, "max_replicas": arguments.max_replicas}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": arguments.target_requests}}
