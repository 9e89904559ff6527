"""`ServeSettings`: names, limits and times of the server, checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from qwen_rerank.calibration import Calibration
from qwen_rerank.checks import check_choice, check_count, check_probability
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.reranker import LongDocuments

_MIB = 1 << 20
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@*]+", re.IGNORECASE)
_MAY_BE_0 = ("max_queue_wait_s", "keep_alive_s", "drain_delay_s", "grace_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Every limit of the server. The defaults suit one model behind one port.

    Attributes:
        served_names: Names a request may give as `model` besides the scorer's own; the first is the one reported.
        any_model: Accept whatever a request gives as `model`.
        instruction: Default instruction; None for the scorer's own.
        long_documents: What happens to an over-long document unless the request says otherwise.
        plain_documents: Repeat documents as strings, as Infinity does, on the rerank routes, too, where others read objects.
        cors_origins: Origins of pages elsewhere that may ask from a browser, such as "https://app.example.org"; "*" is all.
        calibration: Turns log-odds into the scores of answers; fitted for this scorer, instruction and long_documents. A
            request for another instruction or way is refused.
        threshold: Least score in a ranked answer; None for all. Routes that answer for every text keep every text.
        max_body_bytes: Largest request body.
        max_buffered_bytes: Request bodies in memory, all together.
        max_documents: Documents, or pairs, of one request.
        max_request_tokens: Estimated tokens of one request.
        max_queued_tokens: Estimated tokens that may wait, shared fairly by the keys in use; a key with fewer admitted
            requests than `patience_requests` is not asked.
        max_queued_requests: Requests that may be admitted at a time, shared in the same way; twice as many where those of
            new keys come on top.
        max_queue_wait_s: Longest expected wait at which a request is still admitted.
        patience_requests: Admitted requests up to which a key is not refused for the expected wait.
        max_running_tokens: Estimated tokens handed to the scorer at a time; None for twice its own `token_budget`, or
            65,536 where it has none. One scorer call takes a quarter of it; a longer request is scored in slices.
        request_timeout_s: From the complete request to its answer; a request may ask for less.
        head_timeout_s: To receive the request line and headers.
        receive_timeout_s: To receive the body.
        write_timeout_s: For a client to take its answer.
        keep_alive_s: How long an idle connection stays open.
        max_connections: Open connections.
        max_head_bytes: Request line and headers.
        drain_delay_s: From the first SIGTERM to the closing of the listening socket; readiness is red meanwhile.
        grace_s: For the admitted requests to be answered after that.
        watchdog_s: Without any progress while work is running, the process answers 504, turns red and exits.
    """

    served_names: tuple[str, ...] = ()
    any_model: bool = False
    instruction: str | None = None
    long_documents: LongDocuments = "truncate"
    plain_documents: bool = False
    cors_origins: tuple[str, ...] = ()
    calibration: Calibration | None = None
    threshold: float | None = None
    max_body_bytes: int = 8 * _MIB
    max_buffered_bytes: int = 256 * _MIB
    max_documents: int = 1_000
    max_request_tokens: int = 2_000_000
    max_queued_tokens: int = 4_000_000
    max_queued_requests: int = 1_024
    max_queue_wait_s: float = 2.0
    patience_requests: int = 8
    max_running_tokens: int | None = None
    request_timeout_s: float = 120.0
    head_timeout_s: float = 10.0
    receive_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 15.0
    max_connections: int = 2_048
    max_head_bytes: int = 16_384
    drain_delay_s: float = 0.0
    grace_s: float = 30.0
    watchdog_s: float = 300.0

    def __post_init__(self) -> None:
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise InvalidInputError(
                    f"cors_origins must hold origins such as https://app.example.org or http://localhost:3000, without a path, "
                    f"or '*' alone, not {origin!r}."
                )
        object.__setattr__(self, "cors_origins", tuple(map(_as_browsers_send_it, self.cors_origins)))
        names: object = self.served_names
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) and name for name in names):
            raise InvalidInputError(f"served_names must be names in a tuple, none empty, not {self.served_names!r}.")
        if self.threshold is not None:
            check_probability("threshold", self.threshold)
        check_choice("long_documents", self.long_documents, get_args(LongDocuments))
        for name in self.__slots__:
            value = getattr(self, name)
            if name.startswith(("max_", "patience")) and not name.endswith("_s"):
                if value is not None or name != "max_running_tokens":
                    check_count(name, value)
            elif name.endswith("_s"):
                _check_seconds(name, value)


def _check_seconds(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf") or (value == 0 and name not in _MAY_BE_0):  # type: ignore[operator]
        least = "0 or more" if name in _MAY_BE_0 else "above 0"
        raise InvalidInputError(f"{name} must be a number of seconds, {least}, not {value!r}.")


def _as_browsers_send_it(origin: str) -> str:
    """Return an origin in small letters and without the port that its scheme has anyway."""
    origin = origin.lower()
    return origin.removesuffix({"https": ":443", "http": ":80"}.get(origin.partition(":")[0], ""))
