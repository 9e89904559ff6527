"""JSON out: UTF-8, every character as it came, never NaN."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def json_bytes(value: Any) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    return Response(json_bytes(value), status, headers, media_type="application/json")
