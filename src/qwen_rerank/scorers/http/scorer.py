"""`HttpScorer`: a rerank server as a scorer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

import numpy as np

from qwen_rerank.errors import (
    InvalidInputError,
    RerankError,
    RerankTimeoutError,
    ScorerClosedError,
)
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.http import dialects
from qwen_rerank.scorers.http.batches import Batch, BatchRunner, Unit
from qwen_rerank.scorers.http.config import HttpConfig
from qwen_rerank.scorers.http.details import ScoreDetails
from qwen_rerank.scorers.http.jobs import Job, chunks, make_job, make_jobs, no_details
from qwen_rerank.scorers.http.log_odds import UNCALIBRATED
from qwen_rerank.scorers.http.loop_thread import LoopThread
from qwen_rerank.scorers.http.session import Session, load_encoder, open_session
from qwen_rerank.scorers.http.transport import Transport, TransportSettings
from qwen_rerank.types import Fit

logger = logging.getLogger(__name__)


class HttpScorer:
    """Scores over HTTP: vLLM, SGLang, TEI, llama.cpp, Infinity, Xinference, Cohere, Jina, Voyage or our own server.

    With a tokenizer, vLLM and SGLang are sent exact prompts as token ids: the scores are right whatever template they
    were started with, and nothing in a document can become a control token. Sync and async callers share one
    connection pool; after a fork the child opens its own. Several addresses share the work: the least busy server is
    asked, one that fails is left out for a while.

    Args:
        url: One address, or several of equal servers: the root, without the route.
        dialect: What the server is; "auto" asks it.
        mode: "token-ids" or "server-template"; "auto" takes the first where it is possible and warns otherwise.
        model: Name to ask for; needed by xinference and the hosted services.
        api_key: Sent as a bearer token to these addresses only; in no log, error or repr.
        tokenizer: Folder or hub name of the checkpoint, for its `tokenizer.json`.
        template: Prompt variant: "transformers" (model card) or "vllm".
        instruction: Default instruction; an error where the server cannot carry one.
        max_length: Tokens of one prompt; documents are cut to it, or to the server's limit if that is lower.
        timeout_s: Seconds for all of one `score` call; for each request of `score_many`.
        max_batch: Documents in one request; None means what the dialect takes.
        max_concurrency: Requests under way at once.
        scores: What the server's numbers are, if you know better: "logit", "probability", "relevance" or "raw".
        strict_echo: Make another model's name or changed texts in an answer an error, not a warning.
        max_answer_bytes: Cap on an answer's decompressed size.
        public_only: Refuse private addresses and connect to the checked address; for addresses that come from users.

    Attributes:
        name: Dialect and address.
        fingerprint: Changes with the settings that change a score.
        config: All settings but the key.
        calibrated: False where the server's scores are no probabilities of relevance: a threshold then needs a
            calibration.

    Raises:
        InvalidInputError: If an argument is wrong.
        MissingExtraError: Without httpx2.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        dialect: str = "auto",
        mode: Literal["auto", "token-ids", "server-template"] = "auto",
        model: str | None = None,
        api_key: str | None = None,
        tokenizer: str | None = None,
        template: str = "transformers",
        instruction: str | None = None,
        max_length: int = 8192,
        timeout_s: float = 60.0,
        max_batch: int | None = None,
        max_concurrency: int = 8,
        scores: Literal["auto", "logit", "probability", "relevance", "raw"] = "auto",
        strict_echo: bool = False,
        max_answer_bytes: int = 32 * 2**20,
        public_only: bool = False,
    ) -> None:
        self.config = HttpConfig(
            url=url,  # type: ignore[arg-type]
            dialect=dialect, mode=mode, model=model, tokenizer=tokenizer, template=template, instruction=instruction,
            max_length=max_length, timeout_s=timeout_s, max_batch=max_batch, max_concurrency=max_concurrency, scores=scores,
            strict_echo=strict_echo, max_answer_bytes=max_answer_bytes, public_only=public_only,
        )  # fmt: skip
        self._check_known_dialect()
        self._thread = LoopThread(f"qwen-rerank-http {self.config.url[0]}")
        self._transport = Transport(
            TransportSettings(
                urls=self.config.url,
                max_concurrency=max_concurrency,
                max_answer_bytes=max_answer_bytes,
                public_only=public_only,
                api_key=_check_key(api_key),
            )
        )
        self._session: Session | None = None
        self._opening: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
        self._warned: set[str] = set()
        self._finalizer = weakref.finalize(self, _shut_down, self._thread, self._transport)

    def _check_known_dialect(self) -> None:
        config = self.config
        if self._dialect_name is not None and not (
            config.tokenizer and dialects.DIALECTS[self._dialect_name].token_routes
        ):
            dialects.DIALECTS[self._dialect_name].check(model=config.model, instruction=config.instruction)

    @property
    def _dialect_name(self) -> str | None:
        if self.config.dialect != "auto":
            return self.config.dialect
        return dialects.of_host(self.config.url[0])

    @property
    def name(self) -> str:
        """Dialect and address, for people."""
        return f"{self._dialect_name or 'rerank server'} at {self.config.url[0]}"

    @property
    def fingerprint(self) -> str:
        """Changes with the settings that change a score; a server that changes its model unseen does not change it."""
        c = self.config
        server = c.model if c.model is not None else c.url
        parts = [c.dialect, c.mode, server, c.tokenizer, c.template, c.instruction, c.max_length, c.scores]
        return "http-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def calibrated(self) -> bool:
        """Whether the scores are probabilities of relevance, or log-odds of one."""
        if self.config.scores != "auto":
            return self.config.scores not in UNCALIBRATED
        name = self._dialect_name
        return name is None or dialects.DIALECTS[name].kind not in UNCALIBRATED

    def __repr__(self) -> str:
        return f"HttpScorer({list(self.config.url)}, dialect={self.config.dialect!r}, mode={self.config.mode!r})"

    # --- the Scorer protocol -------------------------------------------------------------------------------------

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """Return log-odds, float32 `(n_documents,)`, input order.

        Raises:
            InvalidInputError: If an argument is wrong, or the server cannot carry the instruction.
            DocumentScoringError: If some requests failed; carries the scores of the others.
            RerankServerError: If all failed: `RerankTimeoutError`, `BackendUnavailableError`, `BackendRejectedError`,
                `RateLimitedError` or `ProtocolError`.
        """
        return self.score_details(query, documents, instruction=instruction).log_odds

    def score_details(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> ScoreDetails:
        """As `score`, with what the server reported, what was clipped and cut, and what it counted."""
        job = make_job(query, documents, instruction)
        if not job.texts:
            return no_details()
        session = self._run(self._score([job], per_request=False))
        return self._details(session, job)

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """As `score`, without blocking the event loop."""
        job = make_job(query, documents, instruction)
        if not job.texts:
            return no_details().log_odds
        session = await self._arun(self._score([job], per_request=False))
        return self._details(session, job).log_odds

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """Return one array as `score` gives for each query; with token ids, requests hold prompts of several queries."""
        jobs = make_jobs(queries, documents, instruction)
        if not any(job.texts for job in jobs):
            return [no_details().log_odds for _ in jobs]
        session = self._run(self._score(jobs, per_request=True))
        return [self._details(session, job).log_odds for job in jobs]

    async def ascore_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """As `score_many`, without blocking the event loop."""
        jobs = make_jobs(queries, documents, instruction)
        if not any(job.texts for job in jobs):
            return [no_details().log_odds for _ in jobs]
        session = await self._arun(self._score(jobs, per_request=True))
        return [self._details(session, job).log_odds for job in jobs]

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Return for each text its tokens, the room beside this query, and how many characters are kept.

        Raises:
            InvalidInputError: Without a tokenizer.
        """
        if self.config.tokenizer is None:
            raise InvalidInputError(
                f"{self.name} has no tokenizer, so it cannot tell how much of a document fits; give the checkpoint's folder "
                "or hub name as tokenizer=, or use long_documents='truncate'."
            )
        encoder = self.open().encoder or load_encoder(self.config)
        return [] if encoder is None else encoder.fit(query, texts, instruction=instruction)

    # --- life ----------------------------------------------------------------------------------------------------

    def open(self) -> Session:
        """Ask the server what it is, once, and return what is known of it."""
        if self._session is not None:
            return self._session
        return self._run(self._opened(self.config.timeout_s))

    def close(self) -> None:
        """Close the connections; the scorer cannot be used afterwards."""
        self._finalizer()

    async def aclose(self) -> None:
        """As `close`, without blocking the event loop."""
        await asyncio.to_thread(self._finalizer)

    def __enter__(self) -> HttpScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> HttpScorer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _run(self, coroutine: Coroutine[Any, Any, Session]) -> Session:
        self._check_open(coroutine)
        return self._thread.run(coroutine)

    async def _arun(self, coroutine: Coroutine[Any, Any, Session]) -> Session:
        self._check_open(coroutine)
        return await self._thread.arun(coroutine)

    def _check_open(self, coroutine: Coroutine[Any, Any, Session]) -> None:
        if not self._finalizer.alive:
            coroutine.close()
            raise ScorerClosedError(f"{self.name} was closed; make a new HttpScorer.")

    # --- the work, on the loop of the scorer's thread ------------------------------------------------------------

    async def _score(self, jobs: list[Job], *, per_request: bool) -> Session:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.timeout_s
        session = await self._opened(self.config.timeout_s)
        self._check_instructions(session, jobs)
        batches = await asyncio.to_thread(self._batches, session, jobs)
        runner = BatchRunner(
            self._transport, session, self.config, self._warn, None if per_request else deadline, self.config.timeout_s
        )
        outcomes = await asyncio.gather(*(runner.run(batch) for batch in batches), return_exceptions=True)
        self._collect(jobs, batches, outcomes)
        return session

    def _check_instructions(self, session: Session, jobs: list[Job]) -> None:
        if session.route is None:
            for job in jobs:
                session.dialect.check(model=self.config.model, instruction=self._instruction(job))

    def _instruction(self, job: Job) -> str | None:
        return job.instruction if job.instruction is not None else self.config.instruction

    async def _opened(self, timeout_s: float) -> Session:
        loop = asyncio.get_running_loop()
        if self._opening is None or self._opening[0] is not loop:
            self._opening = (loop, asyncio.Lock())
        async with self._opening[1]:
            if self._session is None:
                self._session = await open_session(self.config, self._transport, loop.time() + timeout_s)
        return self._session

    def _batches(self, session: Session, jobs: list[Job]) -> list[Batch]:
        """Cut all work into requests; prompts of several queries may share one, texts of several cannot."""
        if session.route is not None and session.encoder is not None:
            units = [unit for number, job in enumerate(jobs) for unit in self._prompts(session.encoder, number, job)]
            return chunks(units, session.max_batch)
        return [
            batch
            for number, job in enumerate(jobs)
            for batch in chunks(self._cut_texts(session, number, job), session.max_batch)
        ]

    def _prompts(self, encoder: PromptEncoder, number: int, job: Job) -> list[Unit]:
        prompts = encoder.encode(job.query, job.texts, instruction=job.instruction)
        job.truncated[:] = [prompt.truncated for prompt in prompts]
        return [Unit(number, place, ids=prompt.ids.tolist()) for place, prompt in enumerate(prompts)]

    def _cut_texts(self, session: Session, number: int, job: Job) -> list[Unit]:
        texts = job.texts
        if session.encoder is not None:
            fits = session.encoder.fit(job.query, texts, instruction=self._instruction(job))
            job.truncated[:] = [not fit.fits for fit in fits]
            texts = [text[: fit.kept_chars] for text, fit in zip(texts, fits, strict=True)]
        units = []
        for place, text in enumerate(texts):
            if text.strip() or session.dialect.scores_blank:
                units.append(Unit(number, place, query=job.query, text=text, instruction=self._instruction(job)))
            else:
                job.failed[place] = InvalidInputError(
                    f"a {session.dialect.name} server refuses a request with an empty document; leave it out, or give "
                    "tokenizer= so that prompts are sent as token ids."
                )
        return units

    def _collect(self, jobs: list[Job], batches: list[Batch], outcomes: list[Any]) -> None:
        for batch, outcome in zip(batches, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                if not isinstance(outcome, RerankError):
                    raise outcome
                for unit in batch.units:
                    jobs[unit.job].failed[unit.place] = outcome
                continue
            for unit, score in zip(batch.units, outcome.scores, strict=True):
                jobs[unit.job].scores[unit.place] = score
            self._count(jobs, batch, outcome.prompt_tokens)
        errors = [outcome for outcome in outcomes if isinstance(outcome, RerankError)]
        if errors and len(errors) == len(outcomes):
            # A timeout says less than what went wrong before it.
            raise next((e for e in errors if not isinstance(e, RerankTimeoutError)), errors[0])

    def _count(self, jobs: list[Job], batch: Batch, prompt_tokens: int | None) -> None:
        job = jobs[batch.units[0].job]
        if prompt_tokens is None or len(jobs) > 1:
            job.prompt_tokens = None
        elif job.prompt_tokens is not None:
            job.prompt_tokens += prompt_tokens

    def _details(self, session: Session, job: Job) -> ScoreDetails:
        details = job.details(session)
        if details.saturated.any():
            self._warn(
                f"{self.name} reports probabilities too close to 0 or 1 to tell apart from their printed digits; their "
                "log-odds were clipped at ±20 and keep the reported order."
            )
        return details

    def _warn(self, message: str) -> None:
        """Say something once."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)


def _shut_down(thread: LoopThread, transport: Transport) -> None:
    if thread.started:
        thread.run(transport.aclose())
    thread.close()


def _check_key(key: object) -> str | None:
    if key is None:
        return None
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInputError("api_key must be a text of printable ASCII characters without spaces.")
    return key
