"""Middleware that every request passes before a route sees it, as plain ASGI.

Who asks, whether the request is well formed, its body in bounded memory and time; and afterwards one log line, the
counters, and one JSON shape for every error. A request whose client leaves is cancelled, and with it all its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from qwen_rerank.serve.auth import KeyRing
from qwen_rerank.serve.errors import ApiError, forget_frames, from_exception, no_route
from qwen_rerank.serve.responses import json_bytes
from qwen_rerank.serve.settings import ServeSettings
from qwen_rerank.serve.telemetry import Metrics

logger = logging.getLogger("qwen_rerank.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_CLIENT_LEFT = 499
_DRAIN_FACTOR = 2  # bodies too large are read up to this many times the limit, so that the client sees the answer

_SAFE_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


@dataclass(slots=True)
class RequestContext:
    """One request and what becomes of it; routes find it in `request.state.context`.

    Attributes:
        id: Echoed as `x-request-id`.
        tenant: Whose share it counts in.
        body: The whole body.
        received: Whether reading the body has begun.
        started_at: `time.monotonic()` of the first byte.
        tei: Whether errors have TEI's shape.
        route: The route's path as declared, "other" where none matched.
        status: What was answered, 0 so far.
        event: Further fields of the log line.
    """

    id: str
    started_at: float
    tenant: str = ""
    body: bytes = b""
    received: bool = False
    tei: bool = False
    route: str = "other"
    status: int = 0
    event: dict[str, Any] = field(default_factory=dict)


class RequestMiddleware:
    """ASGI middleware around the routes.

    Args:
        app: The routes.
        settings: Limits.
        keys: Who may ask.
        metrics: Counters.
        public: Paths that need no key.
        known: Every route's path; only these become metric labels.
    """

    def __init__(
        self,
        app: App,
        *,
        settings: ServeSettings,
        keys: KeyRing,
        metrics: Metrics,
        public: frozenset[str],
        known: frozenset[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._public = public
        self._known = known
        self._buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if scope["type"] != "http":
            await self._other(scope, receive, send)
            return
        context = self._context(scope)
        context.route = scope["path"] if scope["path"] in self._known else "other"
        scope.setdefault("state", {})["context"] = context
        send = _recording(context, send, head_only=scope["method"] == "HEAD")
        try:
            await self._serve(context, scope, receive, send)
        except Exception as exc:
            await self._fail(context, exc, scope, receive, send)
            forget_frames(exc)
        except asyncio.CancelledError:  # the grace of a shutdown is over
            stopped = ApiError(503, "shut_down", "the server stopped before the answer was ready.", close=True)
            context.received = True
            await self._fail(context, stopped, scope, receive, send)
        finally:
            self._buffered_bytes -= len(context.body)
            self._note(context, scope)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._app(scope, receive, send)

    async def _serve(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._check_head(context, scope, headers)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            _check_content_headers(headers, self._settings.max_body_bytes)
            context.received = True
            context.body = await self._read(receive)
            if context.body:
                _check_content_type(headers)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the same answer, of which only the head is sent
        await _run_unless_left(self._app, context, scope, receive, send)

    def _context(self, scope: Scope) -> RequestContext:
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        # What is logged and sent back must not be a key, should a client confuse its headers.
        known = _REQUEST_ID.fullmatch(given) and not self._keys.shows_key(given, scope["headers"])
        request_id = given if known else uuid.uuid4().hex
        return RequestContext(request_id, time.monotonic(), tei=scope["path"].startswith("/tei/"))

    def _check_head(self, context: RequestContext, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        if scope["http_version"] not in ("1.0", "1.1"):
            raise ApiError(400, "invalid_http", "only HTTP/1.0 and HTTP/1.1 are spoken here.", close=True)
        is_public = scope["path"] in self._public and scope["method"] in ("GET", "HEAD") and _is_plain_path(scope)
        host = (scope.get("client") or ("",))[0]
        context.tenant = host if is_public else self._keys.identify(headers)
        if context.tenant == "open":
            context.tenant = f"host {host}"  # without keys, a share for each address
        if not _is_plain_path(scope):
            raise no_route()
        if scope["query_string"] and scope["method"] == "POST":
            context.event["query_ignored"] = True

    async def _read(self, receive: Receive) -> bytes:
        """Return the body.

        Raises:
            ApiError: 408 where it comes too slowly, 413 where it is too large, 429 where too many bodies are held.
        """
        limit = self._settings.max_body_bytes
        parts: list[bytes] = []
        size = held = 0
        try:
            async with asyncio.timeout(self._settings.receive_timeout_s):
                more = True
                while more and size <= limit * _DRAIN_FACTOR:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(_CLIENT_LEFT, "client_left", "the client left.")
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    size += len(chunk)
                    if size <= limit:
                        self._hold(len(chunk))
                        held += len(chunk)
                        parts.append(chunk)
                    else:
                        parts.clear()
        except TimeoutError as exc:
            seconds = self._settings.receive_timeout_s
            raise ApiError(408, "slow_body", f"the body did not arrive within {seconds:g} s.", close=True) from exc
        else:
            if size > limit:
                raise _too_large(limit, close=more)
            body, held = b"".join(parts), 0  # the request's now
            return body
        finally:  # also where a server cancels what a client broke off
            self._buffered_bytes -= held

    def _hold(self, n_bytes: int) -> None:
        if self._buffered_bytes + n_bytes > self._settings.max_buffered_bytes:
            message = "the server is busy: too many bodies are being received; try again later."
            raise ApiError(429, "overloaded", message, retry_after_s=1, close=True)
        self._buffered_bytes += n_bytes

    async def _fail(self, context: RequestContext, exc: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        error = from_exception(exc)
        context.event["code"] = error.code
        if error.status == 500:
            logger.exception("internal error", extra={"event": {"request_id": context.id}})
        if context.status or error.status == _CLIENT_LEFT:
            context.status = context.status or _CLIENT_LEFT
            return
        if not context.received and "connection" not in error.headers:
            await self._discard(scope, receive, error)
        with contextlib.suppress(OSError):
            await send_error(error, context, send)

    async def _discard(self, scope: Scope, receive: Receive, error: ApiError) -> None:
        """Read what the client is still sending, so that it sees the answer; close where that would be too much."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        chunked = b"transfer-encoding" in headers
        if (length == b"0" and not chunked) or scope["method"] in ("GET", "HEAD"):
            return
        if b"expect" in headers:  # it waits for our word before it sends anything
            error.headers["connection"] = "close"
            return
        left = self._settings.max_body_bytes * _DRAIN_FACTOR
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.receive_timeout_s):
                while left > 0:
                    message = await receive()
                    if message["type"] != "http.request":
                        return
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        error.headers["connection"] = "close"

    def _note(self, context: RequestContext, scope: Scope) -> None:
        seconds = time.monotonic() - context.started_at
        self._metrics.requests.labels(context.route, str(context.status)).inc()
        self._metrics.seconds.labels(context.route).observe(seconds)
        if context.status == _CLIENT_LEFT:
            self._metrics.disconnected.inc()
        event = {
            "request_id": context.id,
            # Never as the client wrote them: some put a key there.
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "path": context.route,
            "status": context.status,
            "ms": round(1000 * seconds, 1),
            "who": context.tenant,
            **context.event,
        }
        logger.info("request", extra={"event": event})


async def send_error(error: ApiError, context: RequestContext, send: Send) -> None:
    """Send an error in the shape that was asked for."""
    body = json_bytes(error.body(context.id, tei=context.tei))
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _run_unless_left(app: App, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the app; cancel it when the client leaves."""

    async def replay() -> Message:
        return {"type": "http.request", "body": context.body, "more_body": False}

    work = asyncio.ensure_future(app(scope, replay, send))
    if scope["method"] != "POST":
        await work
        return
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(_CLIENT_LEFT, "client_left", "the client left.")
        await work
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _recording(context: RequestContext, send: Send, *, head_only: bool) -> Send:
    async def record(message: Message) -> None:
        if head_only and message["type"] == "http.response.body":
            message["body"] = b""
        if message["type"] == "http.response.start":
            context.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                *_SAFE_HEADERS,
                (b"x-request-id", context.id.encode()),
            ]
        await send(message)

    return record


def _is_plain_path(scope: Scope) -> bool:
    """Whether the path is written in the one way a route is: no escapes, no empty or dot segments."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    path = raw.partition(b"?")[0]
    return path == scope["path"].encode() and b"%" not in path and b"//" not in path and b"/." not in path


def _check_content_headers(headers: list[tuple[bytes, bytes]], limit: int) -> None:
    names = [name for name, _ in headers]
    values = dict(headers)
    if b"content-length" in names and b"transfer-encoding" in names:
        message = "content-length and transfer-encoding exclude each other."
        raise ApiError(400, "ambiguous_length", message, close=True)
    encoding = values.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b""):
        raise ApiError(415, "unsupported_encoding", "content-encoding is not supported; send the body as it is.")
    length = values.get(b"content-length", b"0")
    digits = length.lstrip(b"0") or b"0"
    if digits.isdigit() and (len(digits) > 18 or int(digits) > limit):  # of thousands of digits Python makes no number
        raise _too_large(limit)


def _check_content_type(headers: list[tuple[bytes, bytes]]) -> None:
    kind, *parameters = dict(headers).get(b"content-type", b"").lower().split(b";")
    charsets = [
        value.strip(b' "') for name, _, value in (p.strip().partition(b"=") for p in parameters) if name == b"charset"
    ]
    if kind.strip() != b"application/json" or any(charset not in (b"utf-8", b"utf8") for charset in charsets):
        raise ApiError(415, "unsupported_media_type", "send the body as `Content-Type: application/json` in UTF-8.")


def _too_large(limit: int, *, close: bool = False) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is larger than {limit} bytes.", close=close)
