"""HTTP/1.1 on a connection: uvicorn's h11 protocol with the deadlines and the error shape that it lacks."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.responses import json_bytes
from qwen_rerank.serve.settings import ServeSettings

logger = logging.getLogger("qwen_rerank.serve")

_FIRST_PROBE_S = 0.05  # between the first two, then twice as long each time
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CHUNK_HEAD = re.compile(rb"\r\n[0-9a-fA-F]{1,16}(?=[\r;])")
# Reading a chunk takes as long as reading a few hundred bytes: a body may have so many, and one more for so many bytes.
_FREE_CHUNKS = 5_000
_BYTES_A_CHUNK = 128


def protocol_class(settings: ServeSettings) -> type[H11Protocol]:
    """Return the protocol with these limits; uvicorn makes one object of it for each connection."""

    class Protocol(GuardedProtocol):
        limits = settings

    return Protocol


class GuardedProtocol(H11Protocol):
    """Closes connections whose client is too slow, in whichever direction, and answers broken HTTP in JSON."""

    limits: ServeSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # it would hold the raw path; uvicorn looks only whether anybody logs
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._body_bytes = self._chunks = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; refuse the connection where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            message = "the server is busy: too many connections are open; try again later."
            self._refuse(ApiError(503, "too_many_connections", message, retry_after_s=1))
            return
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; the first of a further request starts its clock."""
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._start_head_timer()
        if self.conn.their_state is h11.IDLE and self._head_too_large(data):
            self._refuse_head()
            return
        if self._chunks_too_small(data):
            self._break_off(ApiError(400, "chunks_too_small", "the body comes in too many too small chunks."))
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Go on for a client that has only ended its own side; tell from one that has left by writing to it."""
        cycle = self.cycle
        waits = cycle is not None and not cycle.response_complete and self.conn.their_state is h11.DONE
        if not waits or self.conn.their_http_version != b"1.1":
            return False
        cycle.keep_alive = False
        self._probe(_FIRST_PROBE_S)
        return True

    def _probe(self, seconds: float) -> None:
        """Send a word that clients must ignore: a side that is closed answers with a reset, and a later word meets it."""
        self._probe_timer = None
        if not self.transport.is_closing() and self.conn.our_state is h11.SEND_RESPONSE:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._probe_timer = self.loop.call_later(seconds, self._probe, 2 * seconds)

    def handle_events(self) -> None:
        """Handle what has arrived."""
        super().handle_events()
        if self.conn.their_state is h11.ERROR:
            self._stop_head_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is no HTTP."""
        self._break_off(ApiError(400, "invalid_http", "this is not valid HTTP/1.1."))

    def _break_off(self, error: ApiError) -> None:
        """Refuse what is arriving; a request whose body it is is dropped, its work cancelled."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_head_timer()
        self._stop_write_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Note that the client does not take its answer."""
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """Note that it does."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()

    def on_response_complete(self) -> None:
        """Give a connection that is to close some time to send what is left, not for ever."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_write_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._start_write_timer()

    def shutdown(self) -> None:
        """Close if idle, else after the running request."""
        super().shutdown()
        if self.transport.is_closing():
            self._start_write_timer()

    def _head_too_large(self, data: bytes) -> bool:
        """Whether a request's head does not end within its limit; told before it is parsed, which takes long."""
        limit = self.limits.max_head_bytes
        received = self.conn.trailing_data[0] + data[: limit + 1]
        return len(received) > limit and not _HEAD_END.search(received, 0, limit)

    def _chunks_too_small(self, data: bytes) -> bool:
        """Whether a chunked body has far more chunks than its size needs; told before they are parsed one by one."""
        if self.conn.their_state is h11.IDLE:
            self._body_bytes = self._chunks = 0
            if b"chunked" not in data[: self.limits.max_head_bytes].lower():
                return False
        elif not any(name == b"transfer-encoding" for name, _ in self.headers):
            return False
        self._body_bytes += len(data)
        self._chunks += len(_CHUNK_HEAD.findall(data))
        return self._chunks > _FREE_CHUNKS + self._body_bytes // _BYTES_A_CHUNK

    def _refuse_head(self) -> None:
        message = f"the headers are larger than {self.limits.max_head_bytes} bytes."
        self._stop_head_timer()
        self._refuse(ApiError(431, "headers_too_large", message))

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_timeout_s, self._head_too_slow)

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0]:
            message = f"the headers did not arrive within {self.limits.head_timeout_s:g} s."
            self._refuse(ApiError(408, "slow_headers", message))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer outside of any request, and close."""
        request_id = uuid.uuid4().hex
        logger.info("refused", extra={"event": {"request_id": request_id, "status": error.status, "code": error.code}})
        body = json_bytes(error.body(request_id))
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": request_id,
        }
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reason = HTTPStatus(error.status).phrase
            response = h11.Response(status_code=error.status, headers=list(headers.items()), reason=reason)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()
        self._start_write_timer()
