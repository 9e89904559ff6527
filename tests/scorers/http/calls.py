"""The client as most tests of faults use it, and servers that reply what they are told."""

from __future__ import annotations

from qwen_rerank.scorers.http import HttpScorer
from tests.scorers.http.stub import Reply

KEY = "sk-very-secret-0123456789"


def llamacpp(url, **options):
    """A scorer whose dialect asks nothing but `/v1/models` beforehand."""
    return HttpScorer(url, dialect="llamacpp", **options)


def results(*pairs):
    return {"results": [{"index": i, "relevance_score": score} for i, score in pairs]}


def replying(*replies):
    """Give one reply after the other to POST requests, the last one for ever."""
    left = list(replies)

    def handle(request):
        if request.method == "GET":
            return Reply(404, {"detail": "Not Found"})
        return left.pop(0) if len(left) > 1 else left[0]

    return handle


GOOD = results((0, 0.5))
