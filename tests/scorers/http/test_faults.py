"""What the client does when a server fails, refuses or takes its time."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from qwen_rerank.errors import (
    BackendRejectedError,
    BackendUnavailableError,
    RateLimitedError,
    RerankTimeoutError,
)
from qwen_rerank.scorers.http import transport
from tests.scorers.http.calls import GOOD, llamacpp, replying, results
from tests.scorers.http.stub import Reply, raw_server, serving


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(transport, "BACKOFF_S", 0.01)


# --- statuses: waited for, tried again, refused ----------------------------------------------------------------------


def test_a_rate_limit_is_waited_out():
    busy = Reply(429, {"message": "slow down"}, headers={"Retry-After": "0.05"})
    with serving(replying(busy, busy, GOOD)) as server, llamacpp(server.url) as scorer:
        assert scorer.score("q", ["d"]) == pytest.approx([0.0])

    assert len(server.posts) == 3


@pytest.mark.parametrize("value", ["86400", "1e300", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_wait_longer_than_the_time_left_is_an_error_at_once(value):
    headers = {"Retry-After": value, "Date": "Wed, 25 Nov 2026 00:00:00 GMT"}
    with (
        serving(replying(Reply(429, {}, headers=headers))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(RateLimitedError, match="asks to wait 86400 s") as caught,
    ):
        scorer.score("q", ["d"])

    assert caught.value.retry_after_s == 86_400
    assert len(server.posts) == 1


@pytest.mark.parametrize("value", ["nan", "-5", "soon", ""])
def test_a_nonsense_wait_counts_as_none(value):
    busy = Reply(429, {}, headers={"Retry-After": value})
    with serving(replying(busy, GOOD)) as server, llamacpp(server.url) as scorer:
        assert len(scorer.score("q", ["d"])) == 1


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_failing_server_is_tried_again(status):
    with serving(replying(Reply(status, {}), GOOD)) as server, llamacpp(server.url) as scorer:
        assert scorer.score("q", ["d"]) == pytest.approx([0.0])


def test_a_server_that_keeps_failing_is_named():
    failing = Reply(500, {"error": {"message": "engine dead", "type": "InternalServerError"}})
    with (
        serving(replying(failing)) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendUnavailableError, match="failed with 500: engine dead") as caught,
    ):
        scorer.score("q", ["d"])

    assert caught.value.status == 500
    assert len(server.posts) == 1 + transport.RETRIES


def test_retries_add_little_load_to_a_server_that_is_down():
    """Forty requests against a dead server: a small reserve of retries and then a tenth, not three for each."""
    with (
        serving(replying(Reply(500, {}))) as server,
        llamacpp(server.url, max_concurrency=4) as scorer,
        pytest.raises(BackendUnavailableError),
    ):
        scorer.score_many(["q"] * 40, [["d"]] * 40)

    assert len(server.posts) <= 40 + transport.RETRY_RESERVE + 40 * transport.RETRY_SHARE + 1


def test_a_refused_connection_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with llamacpp(url) as scorer, pytest.raises(BackendUnavailableError, match="cannot be reached") as caught:
        scorer.score("q", ["d"])

    assert caught.value.url.startswith(url)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="no answer at all"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{", id="half a body"),
        pytest.param(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{", id="half a chunk"),
    ],
)
def test_a_connection_closed_midway_is_unavailable(sent):
    with (
        raw_server(lambda connection: connection.sendall(sent)) as url,
        llamacpp(url) as scorer,
        pytest.raises(BackendUnavailableError, match="cannot be reached"),
    ):
        scorer.score("q", ["d"])


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing then sends RST


def test_a_connection_that_is_reset_is_unavailable():
    with (
        raw_server(reset) as url,
        llamacpp(url) as scorer,
        pytest.raises(BackendUnavailableError, match="cannot be reached"),
    ):
        scorer.score("q", ["d"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_not_tried_again(status):
    body = {"error": {"message": "no such thing", "type": "BadRequestError", "code": status}}
    with (
        serving(replying(Reply(status, body))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendRejectedError, match="no such thing") as caught,
    ):
        scorer.score("q", ["d"])

    assert (caught.value.status, caught.value.code) == (status, "BadRequestError")
    assert len(server.posts) == 1


@pytest.mark.parametrize(
    ("reply", "explained"),
    [
        pytest.param(Reply(404, body=b"404 page not found"), True, id="Ollama, which has no such route"),
        pytest.param(Reply(404, {"detail": "Not Found"}), True, id="vLLM that generates"),
        pytest.param(
            Reply(404, {"error": {"message": "The model does not exist.", "code": 404, "type": "NotFoundError"}}),
            False,
            id="a model's name that vLLM does not serve",
        ),
    ],
)
def test_a_server_without_a_rerank_route_is_told_from_one_without_the_model(reply, explained):
    with (
        serving(replying(reply)) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendRejectedError) as caught,
    ):
        scorer.score("q", ["d"])

    assert ("Ollama never does" in str(caught.value)) == explained


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": "batch too odd", "error_type": "validation"}, "batch too odd"),
        ({"message": "from cohere"}, "from cohere"),
        ({"detail": "from fastapi"}, "from fastapi"),
        ({"detail": [{"loc": ["body"], "msg": "field required", "type": "missing"}]}, "field required"),
        ({"object": "error", "message": "flat", "type": "BadRequestError", "param": None, "code": 400}, "flat"),
    ],
)
def test_every_error_shape_is_read(body, text):
    with (
        serving(replying(Reply(400, body))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendRejectedError, match=text),
    ):
        scorer.score("q", ["d"])


def test_a_body_that_is_too_large_is_sent_in_parts():
    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        texts = request.json["documents"]
        return (
            Reply(413, {"error": "payload too large"})
            if len(texts) > 3
            else results(*[(i, 0.5) for i in range(len(texts))])
        )

    with serving(handle) as server, llamacpp(server.url) as scorer:
        assert len(scorer.score("q", [f"d{i}" for i in range(10)])) == 10


# --- time ------------------------------------------------------------------------------------------------------------


def drip(prefix):
    def act(connection):
        connection.sendall(prefix)
        for _ in range(600):
            time.sleep(0.05)
            connection.sendall(b"a")

    return act


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda connection: time.sleep(30), id="silence"),
        pytest.param(drip(b"HTTP/1.1 200 OK\r\nx-slow: "), id="slow headers"),
        pytest.param(drip(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"), id="slow body"),
    ],
)
def test_one_deadline_covers_everything(act):
    """Each of these servers ends by itself later, and a client that waited for that would call it unavailable."""
    with (
        raw_server(act) as url,
        llamacpp(url, timeout_s=0.4) as scorer,
        pytest.raises(RerankTimeoutError, match="no whole answer in time"),
    ):
        scorer.score("q", ["d"])


def test_a_retry_that_could_not_be_answered_in_time_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(transport.random, "uniform", lambda low, high: 1e9)
    with (
        serving(replying(Reply(503, {}))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendUnavailableError),
    ):
        scorer.score("q", ["d"])

    assert len(server.posts) == 1
