"""One JSON shape for every error, and the status of each error of this package.

Real clients read `detail` (Jina, Voyage, TEI wrappers) or `message` (Cohere); `error` is the OpenAI object, or a plain
string where the TEI shape was asked for. Nothing of the request is echoed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import NotRequired

from typing_extensions import TypedDict

from qwen_rerank.errors import (
    BackendUnavailableError,
    CalibrationMismatchError,
    DeviceOutOfMemoryError,
    DocumentScoringError,
    DocumentTooLongError,
    InvalidInputError,
    InvalidTextError,
    NonFiniteScoreError,
    QueryTooLongError,
    RateLimitedError,
    RerankTimeoutError,
    ScorerClosedError,
    ScorerError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    502: "engine_error",
    503: "unavailable_error",
    504: "timeout_error",
}

# TEI's own names, read by clients that were written for it.
_TEI_TYPES = {413: "validation", 422: "validation", 429: "overloaded", 502: "backend", 503: "unhealthy"}


class ErrorDetail(TypedDict):
    """An error for programs: its code, message and the field at fault."""

    code: str
    message: str
    param: str | None
    type: str


class ErrorAnswer(TypedDict):
    """Every error, on every route; `error` is a plain string where the TEI shape was asked for."""

    detail: str
    message: str
    error: ErrorDetail | str
    error_type: NotRequired[str]
    request_id: str


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        code: Stable machine-readable name.
        message: One sentence for a person, without anything from the request.
        param: Path of the field at fault, such as `documents[3]`.
        retry_after_s: Seconds after which trying again makes sense.
        headers: Further headers.
        close: Whether the connection must not be used again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        if close:
            self.headers["connection"] = "close"

    def body(self, request_id: str, *, tei: bool = False) -> ErrorAnswer:
        """Return the answer's JSON."""
        kind = _TYPES.get(self.status, "server_error")
        detail = ErrorDetail(code=self.code, message=self.message, param=self.param, type=kind)
        answer = ErrorAnswer(detail=self.message, message=self.message, error=detail, request_id=request_id)
        if tei:
            answer["error"], answer["error_type"] = self.message, _TEI_TYPES.get(self.status, "backend")
        return answer


def no_route() -> ApiError:
    """Return the answer to a path that is none of ours, with those that were probably meant."""
    message = (
        "there is no such route; the main ones are POST /v1/rerank, /v2/rerank, /rerank and /score, "
        "GET /v1/models, /health/ready, /metrics and /docs, and the page at /."
    )
    return ApiError(404, "not_found", message)


def from_exception(exc: BaseException) -> ApiError:
    """Return the answer to an error that scoring raised; anything unknown is a bug of ours and says nothing more."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, DocumentScoringError):
        return _from_documents(exc)
    if isinstance(exc, InvalidTextError):
        return ApiError(422, "invalid_unicode", "a text holds a lone surrogate, which UTF-8 cannot carry.")
    if isinstance(exc, QueryTooLongError):
        return ApiError(422, "query_too_long", "query and instruction leave no room for a document.", param="query")
    if isinstance(exc, CalibrationMismatchError):
        message = "the server's scores are calibrated for its own instruction and way of reading long documents; leave both out."
        return ApiError(422, "calibration_mismatch", message, param="instruction")
    if isinstance(exc, InvalidInputError):
        return ApiError(422, "invalid_request", "the scorer refused the request's values.")
    if isinstance(exc, TimeoutError | RerankTimeoutError | asyncio.TimeoutError):
        return ApiError(504, "deadline_exceeded", "the request was not answered before its deadline.")
    if isinstance(exc, RateLimitedError | ScorerClosedError):
        return ApiError(503, "not_ready", "the model is not available at the moment.", retry_after_s=5)
    if isinstance(exc, BackendUnavailableError):
        return ApiError(502, "backend_unavailable", "the scoring backend does not answer.")
    if isinstance(exc, ScorerError):
        return ApiError(502, "engine_error", "the model failed on this request.")
    return ApiError(500, "internal_error", "an internal error happened; the log has it under this request id.")


def forget_frames(exc: BaseException) -> None:
    """Let go of the calls that an error and its causes came through, and of the request that these still hold.

    A call's variables hold the error and the error holds the call, so that a refused body stayed in memory until the
    garbage collector came by, which then stopped every other request for the time that freeing takes.
    """
    waiting, seen = [exc], set[int]()
    while waiting:
        error = waiting.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        error.__traceback__ = None
        waiting += [each for each in (error.__cause__, error.__context__) if each is not None]
        waiting += error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        waiting += error.failed.values() if isinstance(error, DocumentScoringError) else ()


def _from_documents(exc: DocumentScoringError) -> ApiError:
    index, cause = min(exc.failed.items())
    param = f"documents[{index}]"
    if isinstance(cause, DeviceOutOfMemoryError):
        message = f"{param} does not fit the device's memory; send less text."
        return ApiError(413, "document_too_large_for_device", message, param=param)
    if isinstance(cause, DocumentTooLongError):
        message = f"{param} is longer than its room; allow truncation or windows, or send less text."
        return ApiError(413, "document_too_long", message, param=param)
    if isinstance(cause, NonFiniteScoreError):
        return ApiError(502, "non_finite_score", f"the model gave no finite score for {param}.", param=param)
    return ApiError(502, "engine_error", f"the model failed on {param}.", param=param)
