"""HTTP for every dialect, on an event loop in a thread of its own, and the one place that knows the HTTP library (httpx2).

One deadline covers connecting, retries and the body. Failed attempts are tried again only as far as a budget allows,
redirects are never followed, and a body is read up to a cap on its decompressed size.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import threading
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from qwen_rerank.errors import (
    BackendUnavailableError,
    MissingExtraError,
    ProtocolError,
    RerankServerError,
    RerankTimeoutError,
    ScorerClosedError,
)
from qwen_rerank.scorers.http.answers import (
    HttpAnswer,
    is_about_a_limit,
    raise_protocol_error,
    refusal,
    too_many_requests,
    unavailable,
)
from qwen_rerank.scorers.http.endpoints import Endpoint, EndpointPool, public_address
from qwen_rerank.scorers.http.network import certificate_problem, proxy_for, route_url, trusted_certificates
from qwen_rerank.scorers.http.redaction import Secrets, guard_library_logs
from qwen_rerank.scorers.http.settings import HttpConfig

try:
    import httpx2
except ImportError as exc:
    raise MissingExtraError("HttpScorer", package="httpx2", extra="client", cause=exc) from exc

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRIES = 3
BACKOFF_S = 0.2  # the n-th wait is drawn evenly from 0 to this times 2**n
LONGEST_BACKOFF_S = 5.0
CONNECT_S = 5.0  # then another server, or another try
RETRY_SHARE = 0.1  # retries that each request earns, so that retries add at most a tenth to a struggling server's load
RETRY_RESERVE = 10.0
MOST_PIECES = 10_000  # of one answer; each costs far more than the few bytes that it may have
_STEP_BYTES = 1 << 20  # that are unpacked before others have their turn
_TEMPORARY = frozenset({500, 502, 503, 504, 529})
_UNREACHABLE = frozenset({502, 503, 504})


@dataclass(slots=True)
class Connections:
    """One running event loop, its thread, and all that belongs to it alone.

    Attributes:
        loop: The loop; the connections' sockets are its own.
        client: The connection pool.
        endpoints: The servers.
        slots: One for each request that may be under way.
        once: Held while something is found out that need not be found out twice.
        thread: In which the loop runs.
        retry_tokens: Retries that are still allowed.
    """

    loop: asyncio.AbstractEventLoop
    client: httpx2.AsyncClient
    endpoints: EndpointPool
    slots: asyncio.Semaphore
    once: asyncio.Lock
    thread: threading.Thread
    retry_tokens: float = RETRY_RESERVE


# anyio's blocking portal would be this thread, but for two things: a forked child that ends without closing waits for
# ever for a portal whose thread it does not have, and no portal can be closed from its own loop.
_transports: weakref.WeakSet[Transport] = weakref.WeakSet()
# What a forked child inherits. Its loop shares the parent's epoll handle: closing or collecting it in the child would
# take the parent's sockets out of it, so it is kept.
_inherited: list[Connections] = []


class Transport:
    """Sends requests from a loop and a thread of its own, so that sync and async callers share one connection pool.

    A caller's own loop may end, or be cancelled, in the middle of a call. The thread starts on first use, and anew in a
    forked child.

    Args:
        config: How the servers are reached.
        api_key: Sent as a bearer token, to these servers only.
        headers: Sent to these servers only, names in lower case.
    """

    def __init__(
        self, config: HttpConfig, api_key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        headers = headers or {}
        self._secrets = Secrets([*([api_key] if api_key else []), *headers.values()])
        # A proxy would make the connection itself, to an address that was not checked.
        self._proxies = {} if config.public_only else {url: proxy_for(url) for url in config.url}
        guard_library_logs()
        self.has_key = bool(api_key or headers)
        self._headers = {
            "accept": "application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "qwen-rerank",
            **({"authorization": f"Bearer {api_key}"} if api_key else {}),
            **headers,
        }
        self._live: Connections | None = None
        self._closed = False
        self._lock = threading.Lock()
        _transports.add(self)

    # --- the thread, from any other ------------------------------------------------------------------------------

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin a coroutine on the loop; cancelling the future cancels it.

        Raises:
            ScorerClosedError: After `close`.
        """
        with self._lock:  # so that what was begun is there to be cancelled when another thread closes
            self.check_open()
            if self._live is None:
                self._live = self._start()
            return asyncio.run_coroutine_threadsafe(work(), self._live.loop)

    def check_open(self) -> None:
        """Raise `ScorerClosedError` after `close`."""
        if self._closed:
            raise ScorerClosedError(f"the scorer of {self._config.url[0]} was closed; make a new HttpScorer.")

    def close(self) -> None:
        """Cancel what still runs, close the connections and end the thread; any thread may call this, the loop's too."""
        with self._lock:
            live, self._live, self._closed = self._live, None, True
        if live is not None:
            live.loop.call_soon_threadsafe(live.loop.stop)
            # A scorer that was forgotten may be collected by the last task of its own loop.
            if live.thread is not threading.current_thread():
                live.thread.join()

    def _start(self) -> Connections:
        config = self._config
        client = self._client()
        loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=_serve, args=(loop, client), name=f"qwen-rerank-http {config.url[0]}", daemon=True
        )
        live = Connections(
            loop, client, EndpointPool(config.url), asyncio.Semaphore(config.max_concurrency), asyncio.Lock(), thread
        )
        thread.start()
        return live

    def _client(self) -> httpx2.AsyncClient:
        """Return a connection pool.

        Raises:
            InvalidInputError: If a proxy or the certificates that the environment names cannot be used.
        """
        config = self._config
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=config.max_concurrency)
        proxies = {url: proxy for url, proxy in self._proxies.items() if proxy is not None}
        if any(url.startswith("https:") for url in (*config.url, *(proxy.address for proxy in proxies.values()))):
            verify = trusted_certificates(config.verify) or httpx2.create_ssl_context(trust_env=False)
        else:
            verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used, and trusts nobody
        mounts: dict[str, httpx2.AsyncBaseTransport | None] = {}
        for url, proxy in proxies.items():
            parts = urlsplit(url)
            try:
                mounts[f"{parts.scheme}://{parts.netloc}"] = httpx2.AsyncHTTPTransport(
                    proxy=httpx2.Proxy(proxy.address), verify=verify, limits=limits
                )
            except ImportError:
                reason = "SOCKS needs socksio: pip install socksio"
                raise proxy.problem(parts.netloc, reason) from None
            except (ValueError, httpx2.InvalidURL):
                # The library's own message repeats the address, with its password.
                reason = "it must be an http://, https:// or socks5:// address"
                raise proxy.problem(parts.netloc, reason) from None
        return httpx2.AsyncClient(
            follow_redirects=False, trust_env=False, verify=verify, mounts=mounts, limits=limits,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
        )  # fmt: skip

    def _forget(self) -> None:
        self._lock = threading.Lock()
        if self._live is not None:
            _inherited.append(self._live)
        self._live = None

    # --- requests, on the loop -----------------------------------------------------------------------------------

    @property
    def once(self) -> asyncio.Lock:
        """Held while something is found out that need not be found out twice."""
        return self._current().once

    def _current(self) -> Connections:
        if self._live is None:
            self.check_open()
            raise RuntimeError("the loop has not started")
        return self._live

    async def post(self, path: str, body: bytes, *, deadline: float) -> HttpAnswer:
        """Return the answer with status 200.

        Args:
            path: Begins with a slash.
            body: JSON.
            deadline: Time of this loop's clock.

        Raises:
            RerankTimeoutError: No whole answer before the deadline.
            BackendUnavailableError: No connection, or 5xx, that retries did not cure.
            RateLimitedError: 429, and no time or budget left to wait.
            BackendRejectedError: Any other status, or a 500 that names a limit of the server.
            ProtocolError: The answer is no HTTP, or too large.
        """
        async with self._current().slots:
            return await self.within(deadline, self._send("POST", path, body, deadline))

    def shown(self, foreign: object) -> str:
        """Return what a server sent as a message may hold it, without the key."""
        return self._secrets.shown(foreign)

    async def get(self, path: str, *, deadline: float) -> HttpAnswer:
        """Return whatever status a small question gets."""
        return await self.within(deadline, self._send("GET", path, None, deadline, any_status=True))

    async def get_each(self, path: str, *, deadline: float) -> dict[str, HttpAnswer]:
        """Return by its address what each server answers that answers at once; the others are left out."""
        live = self._current()

        async def ask(endpoint: Endpoint) -> tuple[str, HttpAnswer] | None:
            try:
                async with asyncio.timeout_at(min(deadline, live.loop.time() + CONNECT_S)):
                    return endpoint.url, await self._once(live, endpoint, "GET", path, None)
            except (RerankServerError, TimeoutError):
                return None

        return dict(filter(None, await asyncio.gather(*map(ask, live.endpoints.endpoints))))

    async def within(self, deadline: float, work: Awaitable[T]) -> T:
        """Return what `work` gives, or raise `RerankTimeoutError` at the deadline, a time of this loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError as exc:
            if isinstance(exc, RerankServerError):
                raise
            urls = " or ".join(self._config.url)
            raise RerankTimeoutError(
                f"{urls} gave no whole answer in time; allow more with timeout_s, or send fewer documents at once.",
                url=urls,
            ) from exc

    async def _send(
        self, method: str, path: str, body: bytes | None, deadline: float, *, any_status: bool = False
    ) -> HttpAnswer:
        live = self._current()
        live.retry_tokens = min(RETRY_RESERVE, live.retry_tokens + RETRY_SHARE)
        endpoint: Endpoint | None = None
        for attempt in range(RETRIES + 1):
            endpoint = live.endpoints.acquire(live.loop.time(), avoid=endpoint)
            failures_then = endpoint.failures
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
                elif answer.status in _TEMPORARY and not is_about_a_limit(answer):
                    problem = unavailable(answer)
                else:
                    raise refusal(answer)
            finally:
                live.endpoints.release(endpoint, live.loop.time(), failed=failed, failures_then=failures_then)
            # What a dead server had goes to another at once and costs nothing of the budget, which spares struggling ones.
            elsewhere = failed and live.endpoints.has_another(endpoint, live.loop.time())
            wait_s, cost = (0.0, 0.0) if elsewhere else (wait_s, 1.0)
            if attempt == RETRIES or live.loop.time() + wait_s >= deadline or live.retry_tokens < cost:
                raise problem
            live.retry_tokens -= cost
            logger.debug("attempt %d at %s failed (%s); again in %.2f s", attempt + 1, endpoint.url, problem, wait_s)
            await asyncio.sleep(wait_s)
        raise problem

    async def _once(
        self, live: Connections, endpoint: Endpoint, method: str, path: str, body: bytes | None
    ) -> HttpAnswer:
        url = route_url(endpoint.url, path)
        try:
            request = await self._request(live, method, url, body)
            response = await live.client.send(request, stream=True)
            try:
                return await self._read(response, url)
            finally:
                await response.aclose()
        except (httpx2.TransportError, httpx2.StreamError, OSError) as exc:
            problem = self._failure(endpoint, url, exc)
        # Outside, so that the library's error, which may quote what the server sent, is in no chain of ours.
        raise problem

    def _failure(self, endpoint: Endpoint, url: str, exc: Exception) -> RerankServerError:
        """Return the error for what went wrong on the way to an answer."""
        reason = self._secrets.shown(str(exc)) or type(exc).__name__
        broken = isinstance(exc, httpx2.RemoteProtocolError)
        if broken and "disconnected" not in reason and "closed connection" not in reason:
            return ProtocolError(f"{url} answered with something that is no HTTP ({reason}).", url=url)
        if (problem := certificate_problem(url, exc)) is not None:
            return BackendUnavailableError(problem, url=url)
        if (proxy := self._proxies.get(endpoint.url)) is not None:
            return BackendUnavailableError(
                f"{url} cannot be reached through the proxy {proxy.shown}, which {proxy.variable} names ({reason}); correct "
                f"the variable, or add {urlsplit(url).hostname} to NO_PROXY.",
                url=url,
            )
        return BackendUnavailableError(
            f"{url} cannot be reached ({reason}); is the server running, and the address right?", url=url
        )

    async def _request(self, live: Connections, method: str, url: str, body: bytes | None) -> httpx2.Request:
        if not self._config.public_only:
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

    async def _read(self, response: httpx2.Response, url: str) -> HttpAnswer:
        headers = {name.lower(): value for name, value in response.headers.items()}
        head = HttpAnswer(url, response.status_code, headers, b"", self._secrets)
        cap = self._config.max_answer_bytes
        body = bytearray()
        n_pieces = 0
        async for chunk in _decompressed(response, head, cap):
            body += chunk
            n_pieces += 1
            if len(body) > cap:
                raise_protocol_error(head, f"more than {cap} bytes")
            if n_pieces > MOST_PIECES:
                raise_protocol_error(head, f"a body in more than {MOST_PIECES} pieces")
        return HttpAnswer(url, response.status_code, headers, bytes(body), self._secrets)


async def _decompressed(response: httpx2.Response, head: HttpAnswer, cap: int) -> AsyncIterator[bytes]:
    """Yield the body; a megabyte or `cap` bytes come out at a time, however much a piece would expand to."""
    encoding = head.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        async for chunk in response.aiter_raw():
            yield chunk
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise_protocol_error(head, f"content-encoding {head.shown(encoding, 40)!r}, which was not asked for")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
    async for chunk in response.aiter_raw():
        while chunk:
            try:
                yield decoder.decompress(chunk, min(_STEP_BYTES, cap + 1))
            except zlib.error as exc:
                raise_protocol_error(head, f"a broken {encoding} body ({exc})")
            chunk = decoder.unconsumed_tail
            await asyncio.sleep(0)  # a piece may expand a thousandfold


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


def _serve(loop: asyncio.AbstractEventLoop, client: httpx2.AsyncClient) -> None:
    """Run a loop until it is stopped, then cancel its tasks and close its connections."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(client.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _after_fork() -> None:
    for transport in list(_transports):
        transport._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
