"""The model behind the server: loading, checking, its names, and whether it may be asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from enum import StrEnum

from qwen_rerank.errors import RerankError
from qwen_rerank.protocols import SimpleScorer
from qwen_rerank.scorers.adapted import as_scorer
from qwen_rerank.scorers.cached import CachedScorer
from qwen_rerank.scorers.score_cache import ScoreCache
from qwen_rerank.serve.admission import FairQueue
from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.scoring import Scoring
from qwen_rerank.serve.selfcheck import check_scorer
from qwen_rerank.serve.settings import ServeSettings

logger = logging.getLogger("qwen_rerank.serve")

_UNNAMED = ("", "default", "default/not-specified")  # what clients send that have no name to send
_MAX_NAME_CHARS = 4_096
_RETRY_S = {"loading": 5.0, "draining": 2.0, "stalled": 10.0, "failed": 60.0}


class State(StrEnum):
    """The states of the server; only READY takes requests."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"
    STALLED = "stalled"


class Backend:
    """Loads a scorer, checks it, and says whether requests may come.

    Args:
        load: Returns the scorer, or a name that `load_scorer` knows; runs in a thread.
        settings: Limits.
    """

    def __init__(self, load: Callable[[], SimpleScorer | str], settings: ServeSettings) -> None:
        self.state = State.LOADING
        self.reason = "the model is loading"
        self.queue = FairQueue(settings)
        self._load = load
        self._settings = settings
        self._scoring: Scoring | None = None
        self._names: ModelNames | None = None
        self._loading: asyncio.Task[None] | None = None
        self._started_at = time.monotonic()
        self.checks: list[str] = []

    @property
    def scoring(self) -> Scoring:
        """The way to the model.

        Raises:
            ApiError: 503 with `Retry-After` unless ready.
        """
        if self._scoring is None or self.state is not State.READY:
            raise self._not_ready()
        return self._scoring

    @property
    def cache(self) -> ScoreCache | None:
        """The scores that are kept, where the scorer keeps any."""
        scorer = None if self._scoring is None else self._scoring.scorer
        return scorer.cache if isinstance(scorer, CachedScorer) else None

    @property
    def names(self) -> ModelNames:
        """The model's names; they stay while the last requests are answered.

        Raises:
            ApiError: 503 with `Retry-After` until it is loaded.
        """
        if self._names is None:
            raise self._not_ready()
        return self._names

    def _not_ready(self) -> ApiError:
        message = f"the server is not ready: {self.reason}."
        return ApiError(503, "not_ready", message, retry_after_s=_RETRY_S.get(self.state, 1.0))

    @property
    def busy(self) -> bool:
        """Whether a thread of the model may still be running: it is loading, or calls are under way."""
        return bool(self.queue.running_slots) or (self._loading is not None and not self._loading.done())

    def start(self) -> None:
        """Begin to load; the server answers 503 meanwhile."""
        logger.info("loading", extra={"event": {"state": self.state.value}})
        self._started_at = time.monotonic()
        self._loading = asyncio.get_running_loop().create_task(self._prepare())

    async def wait_loaded(self) -> None:
        """Return when loading has ended, well or not."""
        if self._loading is not None:
            await asyncio.wait([self._loading])

    def enter(self, state: State, reason: str) -> None:
        """Go to another state; from DRAINING and STALLED there is no way back."""
        if self.state not in (State.DRAINING, State.STALLED):
            self.state, self.reason = state, reason
            event: dict[str, object] = {"state": state.value, "reason": reason}
            if state is State.READY:
                event["seconds"] = round(time.monotonic() - self._started_at, 1)
            logger.info("ready" if state is State.READY else "state", extra={"event": event})

    async def _prepare(self) -> None:
        try:
            scorer = await asyncio.to_thread(lambda: as_scorer(self._load()))
            self._scoring = Scoring(scorer, self._settings, self.queue)
            self._names = ModelNames(scorer.name, self._settings)
            self.reason = "the model is being checked"
            self.checks = await asyncio.to_thread(check_scorer, scorer)
        except RerankError as exc:
            logger.error("the model cannot be served: %s", exc)
            self.enter(State.FAILED, "the model could not be loaded or failed its self check; the log says why")
        except Exception:
            logger.exception("the model cannot be served")
            self.enter(State.FAILED, "the model could not be loaded; the log says why")
        else:
            self.enter(State.READY, "; ".join(self.checks))


class ModelNames:
    """The names of the one model that is served.

    Args:
        own: The scorer's name; its last part is a name too. A folder goes by its last part alone, so that no answer
            tells where things lie on this machine.
        settings: Further names, and whether any name will do.
    """

    def __init__(self, own: str, settings: ServeSettings) -> None:
        short = own.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        names = [short] if own.startswith(("/", ".", "~")) or "\\" in own else [own, short]
        self.all = list(dict.fromkeys([*settings.served_names, *names]))
        self._known = {name.lower() for name in (*self.all, *_UNNAMED)}
        self._any = settings.any_model

    @property
    def reported(self) -> str:
        """The name that answers carry."""
        return self.all[0]

    def check(self, given: str | None) -> None:
        """Refuse a name that is not served.

        Raises:
            ApiError: 404.
        """
        if given is None or self._any or (len(given) <= _MAX_NAME_CHARS and given.strip().lower() in self._known):
            return
        served = ", ".join(repr(name) for name in self.all)
        message = f"this model is not served here; the server has {served}, and `model` may be left out."
        raise ApiError(404, "model_not_found", message, param="model")
