"""`HttpScorer`: a rerank server as a scorer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from qwen_rerank.errors import InvalidInputError, ScorerClosedError
from qwen_rerank.scorers.base import BaseScorer, Call, ScoreRequest
from qwen_rerank.scorers.http import dialects
from qwen_rerank.scorers.http.answers import UNCALIBRATED
from qwen_rerank.scorers.http.network import check_headers
from qwen_rerank.scorers.http.requests import RequestSender
from qwen_rerank.scorers.http.session import Session, open_session
from qwen_rerank.scorers.http.settings import HttpConfig
from qwen_rerank.scorers.http.transport import Transport
from qwen_rerank.sharing import made_from
from qwen_rerank.types import Fit, Scores

logger = logging.getLogger(__name__)


class HttpScorer(BaseScorer):
    """Scores over HTTP: vLLM, SGLang, TEI, llama.cpp, Infinity, Xinference, Cohere, Jina, Voyage or our own server.

    With a tokenizer, vLLM and SGLang are sent exact prompts as token ids: the scores are right whatever template they
    were started with, and nothing in a document can become a control token. Sync and async callers share one
    connection pool; after a fork the child opens its own. Several addresses share the work: the least busy server is
    asked, one that fails is left out for a while.

    Args:
        url: One address, or several of equal servers: the root; `/v1` and the route may stand there, too.
        dialect: What the server is; "auto" asks it.
        mode: "token-ids" or "server-template"; "auto" takes the first where it is possible and warns otherwise.
        model: Name to ask for; needed by xinference and the hosted services.
        api_key: Sent as a bearer token to these addresses only; in no log, error or repr.
        tokenizer: Folder or hub name of the checkpoint, for its `tokenizer.json`.
        template: Prompt variant: "transformers" (model card) or "vllm".
        instruction: Default instruction; an error where the server cannot carry one.
        max_length: Tokens of one prompt; documents are cut to it, or to the server's limit if that is lower.
        timeout_s: Seconds for all of a call with one query; for each request of a call with several.
        max_batch: Documents in one request; None means what the dialect takes.
        max_concurrency: Requests under way at once.
        scores: What the server's numbers are, if you know better: "logit", "probability", "relevance" or "raw".
        strict_echo: Make another model's name or changed texts in an answer an error, not a warning.
        max_answer_bytes: Cap on an answer's decompressed size.
        public_only: Refuse private addresses and connect to the checked address; for addresses that come from users.
        verify: Path of a CA's certificate, or of the server's own, in PEM; True for the CAs of the system and of
            SSL_CERT_FILE.
        headers: Sent to these addresses, too; kept and hidden like the key.

    Attributes:
        name: Dialect and address.
        fingerprint: Changes with the settings that change a score; a server that changes its model unseen does not
            change it.
        config: All settings but the key and the headers.

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
        verify: bool | str = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.config = HttpConfig(
            url=url,  # type: ignore[arg-type]
            dialect=dialect, mode=mode, model=model, tokenizer=tokenizer, template=template, instruction=instruction,
            max_length=max_length, timeout_s=timeout_s, max_batch=max_batch, max_concurrency=max_concurrency, scores=scores,
            strict_echo=strict_echo, max_answer_bytes=max_answer_bytes, public_only=public_only, verify=verify,
        )  # fmt: skip
        dialect_name = dialects.of_host(self.config.url[0]) if dialect == "auto" else dialect
        self._dialect = None if dialect_name is None else dialects.DIALECTS[dialect_name]
        if self._dialect is not None and not (tokenizer and self._dialect.token_routes):
            self._dialect.check(model=model, instruction=instruction)
        self.name = f"{dialect_name or 'rerank server'} at {self.config.url[0]}"
        self.fingerprint = _fingerprint(self.config)
        key = check_key(api_key, self.config.url)
        self._transport = Transport(self.config, key, check_headers(headers, has_key=key is not None))
        self._finalizer = weakref.finalize(self, self._transport.close)
        self._session: Session | None = None
        self._warned: set[str] = set()

    @property
    def calibrated(self) -> bool:
        """Whether the scores are log-odds of relevance; where they are not, a threshold needs a calibration."""
        if self.config.scores != "auto":
            return self.config.scores not in UNCALIBRATED
        return self._dialect is None or self._dialect.kind not in UNCALIBRATED

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest prompt: the server's limit or the configured one; None where neither is known yet."""
        session = self._session
        if session is not None and session.encoder is not None:
            return session.encoder.max_length
        if self.config.tokenizer is not None:
            return self.config.max_length
        return None if session is None else session.length

    def __repr__(self) -> str:
        return f"HttpScorer({list(self.config.url)}, dialect={self.config.dialect!r}, mode={self.config.mode!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; connections are opened anew where they arrive.

        Raises:
            InvalidInputError: If there is a key, which is never written down.
        """
        if self._transport.has_key:
            raise InvalidInputError(
                f"the scorer of {self.config.url[0]} has an api_key, which is never pickled; make the HttpScorer in the "
                "other process, with the key (or the headers that hold it) from there."
            )
        return made_from, (type(self), asdict(self.config))

    def open(self) -> Session:
        """Ask the server what it is, once, and return what is known of it."""
        if self._session is not None:
            return self._session
        future = self._transport.submit(self._opened)
        try:
            return future.result()
        except BaseException:  # also an interrupted wait
            future.cancel()
            raise

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

    # --- what makes it a scorer ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self._transport.check_open()

    def _begin(self, call: Call) -> Future[list[Scores]]:
        future = self._transport.submit(partial(self._score, call.requests))
        call.on_cancel(future.cancel)
        return future

    async def _score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Return what came of every query's texts; runs on the transport's loop."""
        # One deadline for all that a query needs; a job of many queries takes as long as it takes.
        deadline = asyncio.get_running_loop().time() + self.config.timeout_s
        try:
            session = await self._opened(deadline)
            common = deadline if len(requests) == 1 else None
            sender = RequestSender(self._transport, session, self.config, self._warn, common)
            found = await sender.score(requests)
        except asyncio.CancelledError:
            if not self._finalizer.alive:
                raise ScorerClosedError(f"{self.name} was closed while it was asked.") from None
            raise
        if any(scores.saturated.any() for scores in found):
            self._warn(
                f"{self.name} reports probabilities too close to 0 or 1 to tell apart from their printed digits; their "
                "log-odds were clipped at ±20 and keep the reported order."
            )
        return list(found)

    async def _opened(self, deadline: float | None = None) -> Session:
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + self.config.timeout_s
        # The deadline holds for the wait too: behind others that ask a silent server it would be theirs and one's own.
        return await self._transport.within(deadline, self._open_once(deadline))

    async def _open_once(self, deadline: float) -> Session:
        async with self._transport.once:
            if self._session is None:
                self._session = await open_session(self.config, self._transport, deadline)
        return self._session

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        encoder = self.open().encoder if self.config.tokenizer is not None else None
        if encoder is None:
            raise InvalidInputError(
                f"{self.name} has no tokenizer, so it cannot tell how much of a document fits; give the checkpoint's folder "
                "or hub name as tokenizer=, or use long_documents='truncate'."
            )
        return encoder.fit_checked(query, texts, instruction)

    def _warn(self, message: str) -> None:
        """Say something once."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)


def _fingerprint(config: HttpConfig) -> str:
    c = config
    server = c.model if c.model is not None else c.url
    parts = [c.dialect, c.mode, server, c.tokenizer, c.template, c.instruction, c.max_length, c.scores]
    return "http-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_key(key: object, urls: Sequence[str]) -> str | None:
    """Return a key that a header can carry and that stands in no address, or None."""
    if key is None:
        return None
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInputError("api_key must be a text of printable ASCII characters without spaces.")
    if any(key in url for url in urls):
        raise InvalidInputError("url holds the key, which would be in logs and errors; give it as api_key= alone.")
    return key
