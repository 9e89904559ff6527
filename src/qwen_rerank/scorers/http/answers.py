"""Parses what rerank servers answer, strictly and with no score made up, and turns it into log-odds of relevance."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np

from qwen_rerank.bounded_json import JsonLimitError, check_json
from qwen_rerank.errors import (
    BackendRejectedError,
    BackendUnavailableError,
    MissingExtraError,
    ProtocolError,
    RateLimitedError,
)
from qwen_rerank.scorers.http.limits import stated_limit
from qwen_rerank.scorers.http.redaction import Secrets

try:
    from pydantic_core import from_json
except ImportError as exc:
    raise MissingExtraError("HttpScorer", package="pydantic-core", extra="client", cause=exc) from exc

ScoreKind = Literal["logit", "probability", "relevance", "raw"]
"""What a server's number is.

logit        log-odds of relevance.
probability  the sigmoid of it, in [0, 1].
relevance    in [0, 1], but no probability of relevance: only the order means something.
raw          any number: only the order means something.
"""

UNCALIBRATED = frozenset({"relevance", "raw"})
LIMIT = 20.0  # 1 - sigmoid(20) is 2e-9: beyond it a printed probability holds no more information

_EXCERPT_CHARS = 200
_EXCERPT_BYTES = 4096  # of which so many are read
_ERROR_BYTES = 1 << 16  # a longer error is not read for its message; its beginning is shown
_LARGE_BYTES = 1 << 16  # above it, reading may take tens of milliseconds and is done beside the event loop

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One HTTP answer, read to its end.

    Attributes:
        url: The address asked.
        status: HTTP status.
        headers: Lower-case names.
        body: Decompressed, at most the transport's cap.
        secrets: What no message may hold.
    """

    url: str
    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    secrets: Secrets = field(default_factory=Secrets, repr=False)

    @property
    def excerpt(self) -> str:
        """At most 200 printable characters of the body, without the key."""
        return self.shown(self.body[:_EXCERPT_BYTES].decode("utf-8", "replace"))

    def shown(self, foreign: object, limit: int = _EXCERPT_CHARS) -> str:
        """Return a part of the answer as a message of ours may hold it; nothing else of an answer goes into one."""
        return self.secrets.shown(foreign, limit)


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """The scores of one request.

    Attributes:
        scores: float64 `(n,)`, in the order the texts were sent.
        prompt_tokens: What the server counted, or None.
        model: The model it names, or None.
        echoes: Position to the document text it sent back.
    """

    scores: np.ndarray
    prompt_tokens: int | None = None
    model: str | None = None
    echoes: Mapping[int, str] = field(default_factory=dict)


_NO_ROUTE = (
    " This server does not rerank: Ollama never does, vLLM only when it was started for it (`qwen-rerank template vllm --help` "
    "says how); a vLLM or SGLang that generates scores through HttpScorer(url, tokenizer=...)."
)


def raise_protocol_error(answer: HttpAnswer, what: str) -> NoReturn:
    """Raise `ProtocolError` for an answer with status 200."""
    raise ProtocolError(
        f"{answer.url} answered with {what}; no score is made up for it. It began: {answer.excerpt!r}",
        url=answer.url,
        status=answer.status,
        excerpt=answer.excerpt,
    )


def parse(answer: HttpAnswer) -> Any:
    """Return the JSON of an answer.

    Raises:
        ProtocolError: If it is no JSON, holds NaN or Infinity, or would take too much to read.
    """
    try:
        check_json(answer.body)
        return from_json(answer.body, allow_inf_nan=False, cache_strings="keys")
    except JsonLimitError as exc:
        reason = f"JSON that {exc}{'; lower max_batch' if exc.code == 'too_many_values' else ''}"
    except ValueError as exc:
        reason = f"something that is no JSON ({answer.shown(str(exc))})"
    # Outside, so that the parser's error is in no chain.
    raise_protocol_error(answer, reason if answer.body else "an empty body")


async def read_beside(answer: HttpAnswer, read: Callable[[], T]) -> T:
    """Return what `read` makes of an answer; a large one is read in a thread, so that others need not wait for it."""

    def apart() -> T:
        try:
            return read()
        except ProtocolError as exc:
            # The frames of its traceback would keep the values that were read, as long as the error.
            raise exc.with_traceback(None) from exc.__cause__

    return await asyncio.to_thread(apart) if len(answer.body) > _LARGE_BYTES else apart()


def refusal(answer: HttpAnswer) -> BackendRejectedError:
    """Return the error for an answer of 3xx or 4xx."""
    if 300 <= answer.status < 400:
        message = (
            f"{answer.url} answered {answer.status}, a redirect, which is not followed; give the final address as url."
        )
    else:
        hint = _NO_ROUTE if _lacks_rerank_route(answer) else ""
        message = (
            f"{answer.url} refused the request with {answer.status}: {error_text(answer) or 'no reason given'}.{hint}"
        )
    return BackendRejectedError(
        message, url=answer.url, status=answer.status, excerpt=answer.excerpt, code=error_code(answer)
    )


def _lacks_rerank_route(answer: HttpAnswer) -> bool:
    """Whether a server that may be well otherwise does not rerank; an unknown model has a code of its own."""
    return answer.status == 404 and answer.url.endswith("/rerank") and error_code(answer) != "NotFoundError"


def is_about_a_limit(answer: HttpAnswer) -> bool:
    """Whether a 500 says that documents are too long or too many, so that trying again would not help."""
    return answer.status == 500 and stated_limit(error_text(answer)) is not None


def unavailable(answer: HttpAnswer) -> BackendUnavailableError:
    """Return the error for 5xx."""
    return BackendUnavailableError(
        f"{answer.url} failed with {answer.status}: {error_text(answer) or 'no reason given'}; look at the server's log.",
        url=answer.url,
        status=answer.status,
        excerpt=answer.excerpt,
    )


def too_many_requests(answer: HttpAnswer, retry_after_s: float | None) -> RateLimitedError:
    """Return the error for 429."""
    wait = "" if retry_after_s is None else f" and asks to wait {retry_after_s:g} s"
    return RateLimitedError(
        f"{answer.url} is overloaded or limits the rate (429){wait}; ask less at once, or allow more time with timeout_s.",
        url=answer.url,
        status=answer.status,
        excerpt=answer.excerpt,
        retry_after_s=retry_after_s,
    )


def error_text(answer: HttpAnswer) -> str:
    """Return the server's own words: `error.message`, `error`, `message` or `detail`, at most 200 characters."""
    payload = _payload(answer)
    error = payload.get("error")
    found = error.get("message") if isinstance(error, Mapping) else error
    found = found or payload.get("message") or payload.get("detail")
    if isinstance(found, list):
        found = "; ".join(str(item.get("msg", item)) if isinstance(item, Mapping) else str(item) for item in found[:5])
    return (answer.shown(found) if found else "" if payload else answer.excerpt).rstrip(". ")


def error_code(answer: HttpAnswer) -> str:
    """Return the server's name for its error, or ""."""
    payload = _payload(answer)
    error = payload.get("error")
    inner = error if isinstance(error, Mapping) else {}
    for value in (
        payload.get("error_type"),
        inner.get("type"),
        payload.get("type"),
        inner.get("code"),
        payload.get("code"),
    ):
        if isinstance(value, str) and value:
            return answer.shown(value, 64)
    return ""


def _payload(answer: HttpAnswer) -> Mapping[str, Any]:
    if len(answer.body) > _ERROR_BYTES:
        return {}
    try:
        payload = parse(answer)
    except ProtocolError:
        return {}
    return payload if isinstance(payload, Mapping) else {}


def read_results(
    answer: HttpAnswer, payload: Any, n: int, *, score_keys: Sequence[str] = ("relevance_score", "score")
) -> ParsedAnswer:
    """Return the scores of a result list, wherever the server puts it: top level, `results` or `data`.

    Raises:
        ProtocolError: Unless there are exactly `n` results with each index once and a finite number as score.
    """

    def score(item: Mapping[str, Any], index: int) -> float:
        return finite_score(answer, next((item[key] for key in score_keys if key in item), None), f"result {index}")

    items = result_items(answer, payload, n)
    scores = scores_by_index(answer, items, score)
    echoes = {item["index"]: text for item in items if (text := _document_text(item)) is not None}
    return ParsedAnswer(scores, prompt_tokens(payload), model_name(payload), echoes)


def scores_by_index(
    answer: HttpAnswer, items: Sequence[Mapping[str, Any]], score: Callable[[Mapping[str, Any], int], float]
) -> np.ndarray:
    """Return `score(item, index)` of every result at its index, float64 `(n_items,)`; each index must be there once."""
    scores = np.full(len(items), np.nan)
    for item in items:
        index = item.get("index")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(items):
            raise_protocol_error(
                answer, f"index {answer.shown(index, 40)} where a place in a list of {len(items)} is expected"
            )
        if not np.isnan(scores[index]):
            raise_protocol_error(answer, f"index {index} twice")
        scores[index] = score(item, index)
    return scores


def result_items(answer: HttpAnswer, payload: Any, n: int) -> list[Mapping[str, Any]]:
    """Return the list of results, checked to be `n` objects."""
    found = payload
    if isinstance(payload, Mapping):
        found = next((payload[key] for key in ("results", "data") if key in payload), None)
    if not isinstance(found, list):
        raise_protocol_error(answer, "no list of results")
    if len(found) != n:
        raise_protocol_error(answer, f"{len(found)} results for {n} documents")
    if not all(isinstance(item, Mapping) for item in found):
        raise_protocol_error(answer, "a result that is no object")
    return found


def finite_score(answer: HttpAnswer, value: Any, where: str) -> float:
    """Return a score as a float; what is no finite number breaks the protocol."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise_protocol_error(answer, f"a score of {where} that is no number ({answer.shown(value, 40)})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise_protocol_error(answer, f"a score of {where} that is not finite ({answer.shown(value, 40)})")
    return number


def prompt_tokens(payload: Any) -> int | None:
    """Return `usage.prompt_tokens`, or `meta.tokens.input_tokens`, or None."""
    if not isinstance(payload, Mapping):
        return None
    usage = payload.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    if (
        count is None
        and isinstance(meta := payload.get("meta"), Mapping)
        and isinstance(tokens := meta.get("tokens"), Mapping)
    ):
        count = tokens.get("input_tokens")
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def model_name(payload: Any) -> str | None:
    """Return the model that the server names, or None."""
    name = payload.get("model") if isinstance(payload, Mapping) else None
    return name if isinstance(name, str) and name else None


def _document_text(item: Mapping[str, Any]) -> str | None:
    document = item.get("document", item.get("text"))
    if isinstance(document, Mapping):
        document = document.get("text")
    return document if isinstance(document, str) else None


def to_log_odds(scores: np.ndarray, kind: ScoreKind) -> tuple[np.ndarray, np.ndarray]:
    """Return log-odds, float32 `(n,)`, and which of them were clipped, bool `(n,)`.

    Probabilities are converted in float64 and clipped at ±20. Scores that differ stay different and in order even
    where clipping or float32 would make them equal.

    Args:
        scores: float64 `(n,)`, finite; in [0, 1] for kinds "probability" and "relevance".
        kind: What the numbers are.
    """
    if kind in ("probability", "relevance"):
        with np.errstate(divide="ignore"):
            exact = np.log(scores) - np.log1p(-scores)
        saturated = np.abs(exact) > LIMIT
        exact = np.clip(exact, -LIMIT, LIMIT)
    else:
        exact, saturated = scores, np.zeros(len(scores), dtype=bool)
    largest = float(np.finfo(np.float32).max)
    return _keep_order(np.clip(exact, -largest, largest).astype(np.float32), scores), saturated


def _keep_order(values: np.ndarray, reported: np.ndarray) -> np.ndarray:
    """Move values that rounding made equal apart by one step of float32, towards zero, in the reported order."""
    order = np.argsort(reported, kind="stable")
    out = values.copy()
    _separate([i for i in order[::-1] if values[i] >= 0], out, reported, np.float32(-np.inf))
    _separate([i for i in order if values[i] < 0], out, reported, np.float32(np.inf))
    return out


def _separate(outermost_first: list[int], out: np.ndarray, reported: np.ndarray, towards: np.float32) -> None:
    for previous, i in pairwise(outermost_first):
        if reported[i] == reported[previous]:
            out[i] = out[previous]
        elif abs(out[i]) >= abs(out[previous]):
            out[i] = np.nextafter(out[previous], towards)
