"""Bytes on a socket, for requests that no client library would send."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What came back until the connection was closed; `status` is 0 where nothing came."""

    status: int
    head: bytes
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request(body: bytes = b"", *, path: str = "/v1/rerank", method: str = "POST", **headers: str) -> bytes:
    """Return a well-formed request that asks for the connection to be closed."""
    fields = {
        "Host": "server",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def talk(port: int, data: bytes | str) -> Answer:
    """Send bytes, and return what comes until the server closes."""
    with connect(port) as sock:
        with contextlib.suppress(OSError):  # the server may close before it has read all
            sock.sendall(data.encode() if isinstance(data, str) else data)
        return read_all(sock)


def connect(port: int) -> socket.socket:
    """Return a connection that never waits for more than half a minute."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def read_all(sock: socket.socket) -> Answer:
    """Read until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65_536):
            received += chunk
    return parse(received)


def read_one(sock: socket.socket) -> Answer:
    """Read one answer of a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(65_536)
    length = int(received.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(parse(received).body) < length:
        received += sock.recv(65_536)
    return parse(received)


def parse(received: bytes) -> Answer:
    """Split an answer; only the first where there are several, and no mere word to go on."""
    head, _, body = received.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
    return Answer(status, head, body)
