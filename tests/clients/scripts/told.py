"""What a script is told, and how it answers: `python with_cohere.py '{"url": …}'` prints one line of JSON.

The scripts run in the clients' own environments, where nothing of this repository is installed.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

_told: dict[str, Any] = json.loads(sys.argv[1])

URL: str = _told["url"]
KEY: str = _told["key"]
MODEL: str = _told["model"]
QUERY: str = _told["query"]
DOCUMENTS: list[str] = _told["documents"]
INSTRUCTION: str = _told["instruction"]
TOP_N: int = _told["top_n"]

Hit = tuple[int, float] | tuple[int, float, str]  # place in the request, score, and the text where it came back
Call = Callable[[], Iterable[Hit]]
_calls: dict[str, tuple[Call, dict[str, bool]]] = {}


def client(*, log_odds: bool = False, instructed: bool = False) -> Callable[[Call], Call]:
    """Name a function that asks one client for the best `TOP_N` of `DOCUMENTS`.

    Args:
        log_odds: Its scores are log-odds, not probabilities.
        instructed: It sends `INSTRUCTION`.
    """

    def named(call: Call) -> Call:
        _calls[call.__name__] = (call, {"log_odds": log_odds, "instructed": instructed})
        return call

    return named


def answer() -> None:
    """Ask every client; a failure is the answer of the one that failed."""
    answers: dict[str, dict[str, Any]] = {}
    for name, (call, facts) in _calls.items():
        try:
            answers[name] = {"hits": [list(hit) for hit in call()], **facts}
        except Exception:
            answers[name] = {"error": traceback.format_exc(), **facts}
    print(json.dumps(answers))
