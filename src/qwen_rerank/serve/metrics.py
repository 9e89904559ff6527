"""What `/metrics` shows. Every label's values are a closed set: no path, model or key of a request ever becomes one."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qwen_rerank import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


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
