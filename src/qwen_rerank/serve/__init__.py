"""The HTTP server: a `Scorer` behind the rerank routes that other software already speaks, with a playground page."""

from qwen_rerank.errors import MissingExtraError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.serve", package="fastapi", extra="serve", cause=exc) from exc
