"""Logs and counters of the server.

A log line is one JSON object: control characters escaped, every value short, never a text or a key. Of the counters at
`/metrics` every label's values are a closed set: no path, model or key of a request ever becomes one.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qwen_rerank import __version__

MAX_CHARS = 256
MAX_TRACE_CHARS = 8_192
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

logger = logging.getLogger("qwen_rerank.serve")


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object; `extra={"event": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, ASCII only."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": _short(record.getMessage()),
        }
        line.update({key: _short(value) for key, value in getattr(record, "event", {}).items()})
        if record.exc_info:
            line["trace"] = _trace(record.exc_info[1])
        return json.dumps(line)


class PlainLines(logging.Formatter):
    """Formats a record for a person at a terminal: the time, and a sentence or the message with its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; what cannot be printed is escaped."""
        event = getattr(record, "event", {})
        sentence = _SENTENCES.get(record.getMessage())
        if sentence is None:
            text = " ".join([record.getMessage(), *(f"{key}={_short(value)}" for key, value in event.items())])
        else:
            text = sentence.format_map(event)
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {_short(text)}"
        if record.exc_info:
            line += f"\n{_trace(record.exc_info[1])}"
        return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in line)


_SENTENCES = {
    "listening": "Listening on {url}: a page to try it at /, all routes at /docs; Ctrl-C ends it.",
    "loading": "Loading the model; requests get 503 until it is ready.",
    "ready": "Ready in {seconds} s ({reason}).",
    "state": "The server is {state}: {reason}.",
    "request": "{method} {path} {status} in {ms} ms",
}


def configure(*, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send this package's and uvicorn's logs to `stream` (stderr): plain lines to a terminal, else JSON lines."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainLines() if stream.isatty() else JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("qwen_rerank", "uvicorn"):
        logging.getLogger(name).setLevel(level)
    # One line a request is ours; uvicorn's own would hold the raw path.
    logging.getLogger("uvicorn.access").disabled = True


def _short(value: Any) -> Any:
    return value[:MAX_CHARS] if isinstance(value, str) else value


def _trace(error: BaseException | None) -> str:
    """Return where an error and its causes came from, without their messages, which may quote a request."""
    lines: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lines.append(type(error).__name__)
        frames = traceback.extract_tb(error.__traceback__)
        lines += [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        error = error.__cause__ or error.__context__
    return "\n".join(lines)[:MAX_TRACE_CHARS]


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "qwen_rerank_requests", "Answered requests.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "qwen_rerank_request_seconds",
            "From the first byte to the answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.documents = Counter("qwen_rerank_documents", "Documents scored.", registry=self.registry)
        self.tokens = Counter("qwen_rerank_prompt_tokens", "Prompt tokens scored.", registry=self.registry)
        self.truncated = Counter("qwen_rerank_truncated_documents", "Documents cut to fit.", registry=self.registry)
        self.disconnected = Counter(
            "qwen_rerank_disconnects", "Requests whose client left before the answer.", registry=self.registry
        )
        info = Gauge("qwen_rerank_info", "Version of the server.", ["version"], registry=self.registry)
        info.labels(__version__).set(1)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show the value of `read` at the time of asking."""
        Gauge(f"qwen_rerank_{name}", text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Return the page."""
        return generate_latest(self.registry)
