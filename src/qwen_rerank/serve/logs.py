"""Logs as JSON lines: one event, one line, control characters escaped, every value short, never a text or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

MAX_CHARS = 256
MAX_TRACE_CHARS = 8_192

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


def configure(*, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send this package's and uvicorn's logs to `stream` (stderr) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
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
