"""HTTP for every dialect, and the one place that knows the HTTP library (httpx2).

One deadline covers connecting, retries and the body. Failed attempts are tried again only as far as a budget allows,
redirects are never followed, and a body is read up to a cap on its decompressed size.
"""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from qwen_rerank.errors import (
    BackendUnavailableError,
    MissingExtraError,
    ProtocolError,
    RerankServerError,
    RerankTimeoutError,
)
from qwen_rerank.scorers.http.answers import Answer, broken, error_text, refusal, too_many_requests
from qwen_rerank.scorers.http.endpoints import Endpoint, EndpointPool, public_address

try:
    import httpx2
except ImportError as exc:
    raise MissingExtraError("HttpScorer", package="httpx2", extra="client", cause=exc) from exc

logger = logging.getLogger(__name__)

RETRIES = 3
BACKOFF_S = 0.2  # the n-th wait is drawn evenly from 0 to this times 2**n
LONGEST_BACKOFF_S = 5.0
CONNECT_S = 5.0  # then another server, or another try
RETRY_SHARE = 0.1  # retries that each request earns, so that retries add at most a tenth to a struggling server's load
RETRY_RESERVE = 10.0
_TEMPORARY = frozenset({500, 502, 503, 504, 529})
_UNREACHABLE = frozenset({502, 503, 504})
_inherited: list[object] = []  # clients of a parent process; see loop_thread


@dataclass(slots=True)
class _Live:
    """What belongs to one running event loop."""

    loop: asyncio.AbstractEventLoop
    client: httpx2.AsyncClient
    pool: EndpointPool
    slots: asyncio.Semaphore
    retry_tokens: float = RETRY_RESERVE


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How the servers are reached.

    Attributes:
        urls: Roots of equal servers.
        max_concurrency: Requests under way at once.
        max_answer_bytes: Cap on the decompressed body.
        public_only: Refuse hosts with a private, loopback or reserved address.
        api_key: Sent as a bearer token, to these servers only.
    """

    urls: tuple[str, ...]
    max_concurrency: int
    max_answer_bytes: int
    public_only: bool
    api_key: str | None = field(default=None, repr=False)


class Transport:
    """Sends requests; every coroutine of it runs on the one loop of its scorer."""

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._live: _Live | None = None
        key = settings.api_key
        self._secrets = (key,) if key else ()
        self._headers = {
            "accept": "application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "qwen-rerank",
            **({"authorization": f"Bearer {key}"} if key else {}),
        }

    async def post(self, path: str, body: bytes, *, deadline: float) -> Answer:
        """Return the answer with status 200.

        Args:
            path: Begins with a slash.
            body: JSON.
            deadline: Time of this loop's clock.

        Raises:
            RerankTimeoutError: No whole answer before the deadline.
            BackendUnavailableError: No connection, or 5xx, that retries did not cure.
            RateLimitedError: 429, and no time or budget left to wait.
            BackendRejectedError: Any other status.
            ProtocolError: The answer is no HTTP, or too large.
        """
        async with self._current().slots:
            return await self._within(deadline, self._send("POST", path, body, deadline))

    async def get(self, path: str, *, deadline: float) -> Answer:
        """Return whatever status a small question gets."""
        return await self._within(deadline, self._send("GET", path, None, deadline, any_status=True))

    async def aclose(self) -> None:
        """Close the pool's connections."""
        live, self._live = self._live, None
        if live is not None and live.loop is asyncio.get_running_loop():
            await live.client.aclose()

    def _current(self) -> _Live:
        loop = asyncio.get_running_loop()
        if self._live is None or self._live.loop is not loop:
            if self._live is not None:
                _inherited.append(self._live)  # of before a fork: closing it would disturb the parent
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._settings.max_concurrency)
            self._live = _Live(
                loop,
                httpx2.AsyncClient(
                    follow_redirects=False,
                    # A proxy would make the connection itself, to an address that was not checked.
                    trust_env=not self._settings.public_only,
                    timeout=httpx2.Timeout(None, connect=CONNECT_S),
                    limits=limits,
                ),
                EndpointPool(self._settings.urls),
                asyncio.Semaphore(self._settings.max_concurrency),
            )
        return self._live

    async def _within(self, deadline: float, sending: Awaitable[Answer]) -> Answer:
        try:
            async with asyncio.timeout_at(deadline):
                return await sending
        except TimeoutError as exc:
            if isinstance(exc, RerankServerError):
                raise
            urls = " or ".join(self._settings.urls)
            raise RerankTimeoutError(
                f"{urls} gave no whole answer in time; allow more with timeout_s, or send fewer documents at once.",
                url=urls,
            ) from exc

    async def _send(
        self, method: str, path: str, body: bytes | None, deadline: float, *, any_status: bool = False
    ) -> Answer:
        live = self._current()
        live.retry_tokens = min(RETRY_RESERVE, live.retry_tokens + RETRY_SHARE)
        endpoint: Endpoint | None = None
        for attempt in range(RETRIES + 1):
            endpoint = live.pool.acquire(live.loop.time(), avoid=endpoint)
            wait_s = random.uniform(0, min(LONGEST_BACKOFF_S, BACKOFF_S * 2**attempt))
            failed = True  # also when this is cancelled at the deadline
            try:
                answer = await self._once(live, endpoint, method, path, body)
                failed = answer.status in _UNREACHABLE
            except BackendUnavailableError as exc:
                problem: RerankServerError = exc
            except RerankServerError:
                failed = False
                raise
            else:
                if answer.status == 200 or (any_status and answer.status not in _TEMPORARY):
                    return answer
                if answer.status == 429:
                    asked_s = retry_after_s(answer.headers)
                    problem = too_many_requests(answer, asked_s)
                    wait_s += asked_s or 0.0
                elif answer.status in _TEMPORARY:
                    problem = _unavailable(answer)
                else:
                    raise refusal(answer)
            finally:
                live.pool.release(endpoint, live.loop.time(), failed=failed)
            if attempt == RETRIES or live.loop.time() + wait_s >= deadline or live.retry_tokens < 1:
                raise problem
            live.retry_tokens -= 1
            logger.debug("attempt %d at %s failed (%s); again in %.2f s", attempt + 1, endpoint.url, problem, wait_s)
            await asyncio.sleep(wait_s)
        raise problem

    async def _once(self, live: _Live, endpoint: Endpoint, method: str, path: str, body: bytes | None) -> Answer:
        url = endpoint.url + path
        try:
            request = await self._request(live, method, url, body)
            response = await live.client.send(request, stream=True)
            try:
                return await self._read(response, url)
            finally:
                await response.aclose()
        except httpx2.RemoteProtocolError as exc:
            if "disconnected" in str(exc) or "closed connection" in str(exc):
                raise _unreachable(url, exc) from exc
            raise ProtocolError(f"{url} answered with something that is no HTTP ({exc}).", url=url) from exc
        except (httpx2.TransportError, httpx2.StreamError, OSError) as exc:
            raise _unreachable(url, exc) from exc

    async def _request(self, live: _Live, method: str, url: str, body: bytes | None) -> httpx2.Request:
        if not self._settings.public_only:
            return live.client.build_request(method, url, content=body, headers=self._headers)
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = await asyncio.to_thread(public_address, host, port)
        pinned = parts._replace(netloc=f"[{address}]:{port}" if ":" in address else f"{address}:{port}").geturl()
        return live.client.build_request(
            method,
            pinned,
            content=body,
            headers={**self._headers, "host": parts.netloc},
            extensions={"sni_hostname": host},
        )

    async def _read(self, response: httpx2.Response, url: str) -> Answer:
        headers = {name.lower(): value for name, value in response.headers.items()}
        head = Answer(url, response.status_code, headers, b"", self._secrets)
        cap = self._settings.max_answer_bytes
        body = bytearray()
        async for chunk in _decompressed(response, head, cap):
            body += chunk
            if len(body) > cap:
                broken(head, f"more than {cap} bytes")
        return Answer(url, response.status_code, headers, bytes(body), self._secrets)


async def _decompressed(response: httpx2.Response, head: Answer, cap: int) -> AsyncIterator[bytes]:
    """Yield the body; at most `cap` bytes come out of one piece, however much it would expand to."""
    encoding = head.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        async for chunk in response.aiter_raw():
            yield chunk
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        broken(head, f"content-encoding {encoding!r:.40}, which was not asked for")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
    async for chunk in response.aiter_raw():
        try:
            yield decoder.decompress(chunk, cap + 1)
        except zlib.error as exc:
            broken(head, f"a broken {encoding} body ({exc})")


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a server asks to wait, or None; an absurd value counts as a day."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        until, now = _date(value), _date(headers.get("date", "")) or datetime.now(UTC)
        if until is None:
            return None
        seconds = (until - now).total_seconds()
    # `not >=` also catches NaN.
    return None if not seconds >= 0 else min(seconds, 86_400.0)


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


def _unavailable(answer: Answer) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{answer.url} failed with {answer.status}: {error_text(answer) or 'no reason given'}; look at the server's log.",
        url=answer.url,
        status=answer.status,
        excerpt=answer.excerpt,
    )


def _unreachable(url: str, exc: Exception) -> BackendUnavailableError:
    reason = str(exc) or type(exc).__name__
    return BackendUnavailableError(
        f"{url} cannot be reached ({reason}); is the server running, and the address right?", url=url
    )
