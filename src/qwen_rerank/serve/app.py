"""The routes: each reads its family's request, asks the one model, and answers in that family's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from qwen_rerank import __version__
from qwen_rerank.protocols import FirstStage, SimpleScorer
from qwen_rerank.serve import openapi, responses
from qwen_rerank.serve.auth import KeyRing
from qwen_rerank.serve.backend import Backend, State
from qwen_rerank.serve.errors import ApiError, no_route
from qwen_rerank.serve.middleware import RequestContext, RequestMiddleware
from qwen_rerank.serve.playground import Playground
from qwen_rerank.serve.responses import json_response
from qwen_rerank.serve.schemas import (
    MixedbreadRequest,
    PairsRequest,
    RankingRequest,
    RequestT,
    RerankRequest,
    ScoringBody,
    StoreSearchRequest,
    TeiRequest,
    parse_object,
    read,
)
from qwen_rerank.serve.scoring import RerankJob, RerankResult, job_of
from qwen_rerank.serve.settings import ServeSettings
from qwen_rerank.serve.store_search import StoreSearch, Turns
from qwen_rerank.serve.telemetry import METRICS_TYPE, Metrics

_LARGE_BODY_BYTES = 1 << 16  # above it, reading and answering may take tens of milliseconds and go to a thread
_TIMEOUT_HEADER = "x-request-timeout-ms"
_PINECONE_HEADER = "x-pinecone-api-version"

RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/reranking", "/reranking")
SEARCH_PATH = "/v1/search"
HEALTH_PATHS = ("/health", "/health/live", "/health/ready")


def create_app(
    scorer: SimpleScorer | str | None = None,
    *,
    load: Callable[[], SimpleScorer | str] | None = None,
    first_stage: FirstStage | None = None,
    settings: ServeSettings | None = None,
    api_keys: Iterable[str] = (),
) -> FastAPI:
    """Return the server as an ASGI app.

    Args:
        scorer: A scorer, any object with `name` and `score(query, documents)`, or a name that `load_scorer` knows; or
        load: a function that returns one of these. Loading is done in a thread when the app starts.
        first_stage: A store, or another first stage, that `/v1/search` searches, and the page at `/` beside its samples.
        settings: Limits; None for the defaults.
        api_keys: Keys that open it; without any it is open to all.
    """
    chosen = settings or ServeSettings()
    backend = Backend(load or (lambda: _given(scorer)), chosen)
    return _Server(backend, chosen, KeyRing(api_keys), first_stage).app


def _given(scorer: SimpleScorer | str | None) -> SimpleScorer | str:
    if scorer is None:
        raise TypeError("create_app needs a scorer or a function that loads one.")
    return scorer


class _Server:
    """The routes over one backend."""

    def __init__(
        self, backend: Backend, settings: ServeSettings, keys: KeyRing, first_stage: FirstStage | None
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._metrics = Metrics()
        self._started_at = int(time.time())
        self._watch_queue()
        self.app = FastAPI(
            title="qwen-rerank",
            version=__version__,
            description=openapi.DESCRIPTION,
            lifespan=self._lifespan,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        self.app.state.backend = backend
        self.app.add_exception_handler(HTTPException, _routing_error)
        turns = None if first_stage is None else Turns(first_stage)
        self._store_search = StoreSearch(backend, settings, self._run, turns)
        self._add_routes(with_keys=len(keys) > 0)
        playground = Playground(backend, self._run, self.read, turns)
        playground.add_routes(self.app, openapi.extra)
        paths = frozenset(path for route in self.app.routes if (path := getattr(route, "path", None)))
        self.app.add_middleware(
            RequestMiddleware,
            settings=settings,
            keys=keys,
            metrics=self._metrics,
            public=frozenset(HEALTH_PATHS) | playground.static_paths,
            known=paths,
        )
        if settings.cors_origins:  # outermost: a browser asks for leave without a key, and reads errors too
            self.app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "HEAD", "POST"],
                allow_headers=[
                    "authorization",
                    "api-key",
                    "x-api-key",
                    "content-type",
                    "x-request-id",
                    _TIMEOUT_HEADER,
                ],
                expose_headers=["x-request-id", "retry-after"],
            )

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._backend.start()
        yield
        self._backend.enter(State.DRAINING, "the server is shutting down")

    def _watch_queue(self) -> None:
        queue, backend = self._backend.queue, self._backend
        self._metrics.watch("queued_tokens", "Estimated tokens that wait.", lambda: queue.queued_tokens)
        self._metrics.watch("running_tokens", "Estimated tokens with the model.", lambda: queue.running_tokens)
        self._metrics.watch("running_calls", "Scorer calls under way.", lambda: queue.running_slots)
        self._metrics.watch("admitted_requests", "Requests admitted and not answered.", lambda: queue.requests)
        self._metrics.watch(
            "cache_hits", "Scores found in the cache.", lambda: backend.cache.hits if backend.cache else 0
        )
        self._metrics.watch(
            "cache_misses", "Scores that the cache did not have.", lambda: backend.cache.misses if backend.cache else 0
        )
        self._metrics.watch("ready", "1 when requests are taken.", lambda: float(backend.state is State.READY))

    def _add_routes(self, *, with_keys: bool) -> None:
        app, extra = self.app, openapi.extra
        rerank = {
            "openapi_extra": extra(RerankRequest, TeiRequest, RankingRequest, MixedbreadRequest),
            "tags": ["rerank"],
        }
        for path in RERANK_PATHS:
            app.add_api_route(path, self.rerank, methods=["POST"], **openapi.documented(rerank, path))
        for path, handler, kind in (
            ("/score", self.score, PairsRequest),
            ("/v1/score", self.score, PairsRequest),
            ("/v1/ranking", self.ranking, RankingRequest),
            ("/tei/rerank", self.tei, TeiRequest),
            ("/infinity/rerank", self.infinity, RerankRequest),
            ("/voyage/v1/rerank", self.voyage, RerankRequest),
        ):
            options = {"openapi_extra": extra(kind), "tags": ["rerank"]}
            app.add_api_route(path, handler, methods=["POST"], **openapi.documented(options, path))
        options = {"openapi_extra": extra(StoreSearchRequest), "tags": ["search"]}
        app.add_api_route(SEARCH_PATH, self.search, methods=["POST"], **openapi.documented(options, SEARCH_PATH))
        pages: dict[str, Callable[..., Awaitable[Response]]] = {
            "/v1/models": self.models,
            "/models": self.models,
            "/infinity/models": self.models,
            "/info": self.info,
            "/tei/info": self.info,
            "/health": self.ready,
            "/health/live": self.live,
            "/health/ready": self.ready,
            "/metrics": self.metrics,
            "/docs": self.docs,
        }
        for path, page in pages.items():
            app.add_api_route(path, page, methods=["GET"], **openapi.documented({"tags": ["server"]}, path))
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"], include_in_schema=False)
        openapi.install(app, with_keys=with_keys, public=HEALTH_PATHS)

    async def rerank(self, request: Request) -> Response:
        """Rank documents by relevance; answers in the shape of the request.

        `texts` instead of `documents` is TEI's, `passages` NIM's, `input` Mixedbread's; Pinecone's clients send a header.
        """
        context: RequestContext = request.state.context

        def kind(body: dict[str, Any]) -> type[RerankRequest | TeiRequest | RankingRequest | MixedbreadRequest]:
            context.tei = "texts" in body and "documents" not in body
            if context.tei:
                return TeiRequest
            if "documents" in body:
                return RerankRequest
            return RankingRequest if "passages" in body else MixedbreadRequest if "input" in body else RerankRequest

        wanted = await self.read(request, kind)
        if isinstance(wanted, TeiRequest):
            return await self._texts(request, wanted)
        if isinstance(wanted, RankingRequest):
            return await self._passages(request, wanted)
        if isinstance(wanted, MixedbreadRequest):
            return await self._inputs(request, wanted)
        if _PINECONE_HEADER in request.headers:
            return await self._listed(request, wanted, responses.pinecone)
        # Nothing in a request of LiteLLM's tells whether it reads documents as objects or as strings.
        plain = self._settings.plain_documents
        return await self._listed(request, wanted, responses.infinity if plain else responses.rerank)

    async def infinity(self, request: Request) -> Response:
        """As /rerank, with documents as plain strings: Infinity's shape."""
        return await self._listed(request, await self.read(request, RerankRequest), responses.infinity)

    async def voyage(self, request: Request) -> Response:
        """As /rerank, with the list under `data`: Voyage's shape."""
        return await self._listed(request, await self.read(request, RerankRequest), responses.voyage)

    async def tei(self, request: Request) -> Response:
        """Rank `texts`; a bare list as Text Embeddings Inference gives."""
        return await self._texts(request, await self.read(request, TeiRequest))

    async def ranking(self, request: Request) -> Response:
        """Rank `passages`; log-odds as NVIDIA NIM gives."""
        return await self._passages(request, await self.read(request, RankingRequest))

    async def score(self, request: Request) -> Response:
        """Score pairs, 1:1, 1:N or N:N, in input order: vLLM's shape."""
        wanted = await self.read(request, PairsRequest)
        queries, documents = wanted.queries, wanted.documents
        if len(queries) not in (1, len(documents)):
            message = f"{len(queries)} queries and {len(documents)} documents: lengths must be 1:1, 1:N or N:N."
            raise ApiError(422, "invalid_pairs", message, param="queries")
        if len(queries) == 1:
            jobs = [job_of(wanted, queries[0], documents)]
        else:
            jobs = [job_of(wanted, query, [text]) for query, text in zip(queries, documents, strict=True)]
        results = await self._run(request, wanted, jobs)
        request_id, model = request.state.context.id, self._backend.names.reported
        return json_response(
            responses.scores(results, log_odds=wanted.wants_log_odds, request_id=request_id, model=model)
        )

    async def search(self, request: Request) -> Response:
        """Search the server's store in two rounds; passages with their places, best first."""
        wanted = await self.read(request, StoreSearchRequest)
        async with self._backend.queue.deadline(self._timeout_s(request)):
            answer = await self._store_search.search(request, wanted)
        return await asyncio.to_thread(json_response, answer)

    async def models(self) -> Response:
        """List the names of the model."""
        data = [self._model(name) for name in self._backend.names.all]
        return json_response(responses.ModelList(object="list", data=data))

    async def model(self, name: str) -> Response:
        """Describe one name of the model, as OpenAI and Xinference do."""
        self._backend.names.check(name)
        return json_response(self._model(name))

    def _model(self, name: str) -> responses.Model:
        length = self._backend.scoring.scorer.max_length
        return responses.model(name, max_length=length, started_at=self._started_at)

    async def info(self) -> Response:
        """Describe the model as Text Embeddings Inference does."""
        scorer = self._backend.scoring.scorer
        labels = {"id2label": {"0": "relevance"}, "label2id": {"relevance": 0}}
        answer = responses.Info(
            model_id=self._backend.names.reported,
            model_sha=scorer.fingerprint,
            model_type={"reranker": labels},
            max_client_batch_size=self._settings.max_documents,
            max_input_length=scorer.max_length,
            auto_truncate=self._settings.long_documents == "truncate",
            version=__version__,
        )
        return json_response(answer)

    async def live(self) -> Response:
        """Say that the process answers."""
        return json_response(responses.Health(status="live"))

    async def ready(self) -> Response:
        """Say whether requests are taken: 200, or 503 with the reason."""
        backend = self._backend
        if backend.state is not State.READY:
            raise ApiError(503, backend.state.value, f"the server is not ready: {backend.reason}.", retry_after_s=2)
        return json_response(
            responses.Health(status="ready", model=self._backend.names.reported, checked=backend.checks)
        )

    async def metrics(self) -> Response:
        """Show the counters for Prometheus."""
        return Response(self._metrics.text(), media_type=METRICS_TYPE)

    async def docs(self) -> Response:
        """Show this description as a page that needs nothing from elsewhere."""
        return openapi.docs_page(self.app)

    async def _listed(self, request: Request, wanted: RerankRequest, answer: Callable[..., object]) -> Response:
        result = await self._rank(request, wanted, wanted.query, wanted.documents)
        request_id, model = request.state.context.id, self._backend.names.reported
        return await _sized(request, lambda: answer(wanted, result, request_id=request_id, model=model))

    async def _texts(self, request: Request, wanted: TeiRequest) -> Response:
        result = await self._rank(request, wanted, wanted.query, wanted.texts)
        return await _sized(request, lambda: responses.tei(wanted, result))

    async def _inputs(self, request: Request, wanted: MixedbreadRequest) -> Response:
        result = await self._rank(request, wanted, wanted.query, wanted.input)
        model = self._backend.names.reported
        return await _sized(request, lambda: responses.mixedbread(wanted, result, model=model))

    async def _passages(self, request: Request, wanted: RankingRequest) -> Response:
        return json_response(responses.ranking(await self._rank(request, wanted, wanted.query, wanted.passages)))

    async def read(
        self,
        request: Request,
        kind: type[RequestT] | Callable[[dict[str, Any]], type[RequestT]],
        *,
        most: int | None = None,
    ) -> RequestT:
        """Return the body as a request of this kind, or of the one that `kind(body)` says, with at most so many texts.

        Raises:
            ApiError: 503 unless ready, before anything is read; then whatever is wrong with the body, which an
                instruction is for a model that takes none.
        """
        scoring = self._backend.scoring
        body: bytes = request.state.context.body

        def parse() -> RequestT:
            value = parse_object(body)
            chosen = kind if isinstance(kind, type) else kind(value)
            return read(chosen, value, max_documents=most or self._settings.max_documents)

        wanted = await asyncio.to_thread(parse) if len(body) > _LARGE_BODY_BYTES else parse()
        if wanted.wanted_instruction is not None and not scoring.scorer.takes_instruction:
            # The scorer's own sentence repeats the instruction and may name a folder of this machine.
            name = self._backend.names.reported
            message = f"instruction: {name} takes none; leave it out, or put it into the query."
            raise ApiError(422, "instruction_not_taken", message, param="instruction")
        return wanted

    async def _rank(self, request: Request, wanted: ScoringBody, query: str, documents: Sequence[str]) -> RerankResult:
        [result] = await self._run(request, wanted, [job_of(wanted, query, documents)])
        return result

    async def _run(self, request: Request, wanted: ScoringBody, jobs: Sequence[RerankJob]) -> list[RerankResult]:
        """Ask the model, and count what it did."""
        scoring = self._backend.scoring
        self._backend.names.check(wanted.model)
        context: RequestContext = request.state.context
        n_documents = sum(len(job.documents) for job in jobs)
        context.event |= {"documents": n_documents}
        results = await scoring.run(context.tenant, jobs, timeout_s=self._timeout_s(request))
        tokens = sum(result.tokens for result in results)
        context.event |= {"tokens": tokens}
        self._metrics.documents.inc(n_documents)
        self._metrics.tokens.inc(tokens)
        self._metrics.truncated.inc(sum(hit.truncated for result in results for hit in result.ranked))
        return results

    def _timeout_s(self, request: Request) -> float:
        """Return the seconds that this request may take: the server's limit, or less where the client says so."""
        given = request.headers.get(_TIMEOUT_HEADER)
        if given is None:
            return self._settings.request_timeout_s
        if not given.isascii() or not given.isdigit() or len(given) > 9:
            message = f"{_TIMEOUT_HEADER} must be a number of milliseconds."
            raise ApiError(400, "invalid_timeout", message, param=_TIMEOUT_HEADER)
        return min(self._settings.request_timeout_s, int(given) / 1000)


async def _sized(request: Request, answer: Callable[[], object]) -> Response:
    """Return an answer that may repeat the documents; a large one is written beside the event loop."""
    if len(request.state.context.body) > _LARGE_BODY_BYTES:
        return await asyncio.to_thread(lambda: json_response(answer()))
    return json_response(answer())


async def _routing_error(request: Request, exc: Exception) -> Response:
    """Give 404 and 405 the shape of every other error."""
    if isinstance(exc, HTTPException) and exc.status_code == 405:
        raise ApiError(405, "method_not_allowed", "this route does not take this method.", headers=exc.headers)
    raise no_route()
