"""What the client does when a server, or the way to it, misbehaves."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import struct
import time

import pytest

from qwen_rerank.errors import (
    BackendRejectedError,
    BackendUnavailableError,
    DocumentScoringError,
    InvalidInputError,
    ProtocolError,
    RateLimitedError,
    RerankTimeoutError,
)
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.http import HttpScorer, transport
from tests.scorers.http import wire
from tests.scorers.http.stub import Reply, raw_server, serving

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(transport, "BACKOFF_S", 0.01)


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

# --- D1, D2, D3: statuses ------------------------------------------------------------------------------------------


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


# --- D4: time ------------------------------------------------------------------------------------------------------


def drip(prefix):
    def act(connection):
        connection.sendall(prefix)
        for _ in range(100):
            time.sleep(0.05)
            connection.sendall(b"a")

    return act


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda connection: time.sleep(3), id="silence"),
        pytest.param(drip(b"HTTP/1.1 200 OK\r\nx-slow: "), id="slow headers"),
        pytest.param(drip(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"), id="slow body"),
    ],
)
def test_one_deadline_covers_everything(act):
    """Kept to a quarter of a second; the best of three tries counts, since a busy machine makes it only later."""
    took = []
    with raw_server(act) as url, llamacpp(url, timeout_s=0.4) as scorer:
        for _ in range(3):
            start = time.perf_counter()
            with pytest.raises(RerankTimeoutError, match="no whole answer in time"):
                scorer.score("q", ["d"])
            took.append(time.perf_counter() - start)

    assert 0.35 <= min(took) <= 0.65


def test_a_retry_that_could_not_be_answered_in_time_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(transport.random, "uniform", lambda low, high: 1e9)
    with (
        serving(replying(Reply(503, {}))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(BackendUnavailableError),
    ):
        scorer.score("q", ["d"])

    assert len(server.posts) == 1


# --- D5, D6, D7, D8: answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param(b"<html>Gateway</html>", "no JSON", id="HTML"),
        pytest.param(b"", "an empty body", id="empty"),
        pytest.param(b'{"results": [', "no JSON", id="cut JSON"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="deep JSON"),
        pytest.param(b'{"results": [{"index": 0, "relevance_score": NaN}]}', "NaN is no JSON number", id="NaN"),
        pytest.param(b'{"results": [{"index": 0, "relevance_score": -Infinity}]}', "no JSON number", id="Infinity"),
        pytest.param(b"\xff\xfe\x00", "no JSON", id="no UTF-8"),
        pytest.param(b'"results"', "no list of results", id="a string"),
        pytest.param(b'{"results": null}', "no list of results", id="null"),
        pytest.param(b'{"results": [5]}', "a result that is no object", id="numbers"),
    ],
)
def test_an_answer_that_is_no_result_list_is_an_error(body, what):
    with (
        serving(replying(Reply(body=body))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(ProtocolError, match=what) as caught,
    ):
        scorer.score("q", ["d"])

    assert len(caught.value.excerpt) <= 200
    assert caught.value.excerpt.isprintable()


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(results((0, 0.5)), id="fewer"),
        pytest.param(results((0, 0.5), (1, 0.5), (2, 0.5)), id="more"),
        pytest.param(results((0, 0.5), (0, 0.5)), id="twice"),
        pytest.param(results((0, 0.5), (-1, 0.5)), id="negative"),
        pytest.param(results((0, 0.5), (2, 0.5)), id="out of range"),
        pytest.param(results((0, 0.5), (1.0, 0.5)), id="float"),
        pytest.param(results((0, 0.5), (True, 0.5)), id="bool"),
        pytest.param(results((0, 0.5), ("1", 0.5)), id="string"),
        pytest.param(results((0, 0.5), (None, 0.5)), id="null"),
    ],
)
def test_indices_must_be_each_place_once(reply):
    with serving(replying(reply)) as server, llamacpp(server.url) as scorer, pytest.raises(ProtocolError):
        scorer.score("q", ["a", "b"])


@pytest.mark.parametrize("score", [None, "0.5", [0.5], True, {}, 10**400, 1e999])
def test_scores_must_be_finite_numbers(score):
    body = json.dumps(results((0, 0.5), (1, score))).replace("Infinity", "1e999").encode()
    with (
        serving(replying(Reply(body=body))) as server,
        llamacpp(server.url) as scorer,
        pytest.raises(ProtocolError, match=r"no number|not finite"),
    ):
        scorer.score("q", ["a", "b"])


def test_unsorted_results_find_their_places():
    with serving(replying(results((2, 0.1), (0, 0.5), (1, 0.9)))) as server, llamacpp(server.url) as scorer:
        scores = scorer.score("q", ["a", "b", "c"])

    assert scores == pytest.approx([0.0, 2.1972246, -2.1972246])


# --- D10, D11, D12: hostile servers ------------------------------------------------------------------------------------


def endless(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def test_an_endless_body_is_cut_off():
    with (
        raw_server(endless) as url,
        llamacpp(url, max_answer_bytes=2**20) as scorer,
        pytest.raises(ProtocolError, match="more than 1048576 bytes"),
    ):
        scorer.score("q", ["d"])


def test_a_compression_bomb_is_cut_off():
    bomb = gzip.compress(b" " * 2**26)
    reply = Reply(body=bomb, headers={"content-encoding": "gzip"})
    with (
        serving(replying(reply)) as server,
        llamacpp(server.url, max_answer_bytes=2**20) as scorer,
        pytest.raises(ProtocolError, match="more than 1048576 bytes"),
    ):
        scorer.score("q", ["d"])


def test_a_compressed_answer_is_read():
    reply = Reply(body=gzip.compress(json.dumps(GOOD).encode()), headers={"content-encoding": "gzip"})
    with serving(replying(reply)) as server, llamacpp(server.url) as scorer:
        assert scorer.score("q", ["d"]) == pytest.approx([0.0])


def test_an_encoding_that_was_not_asked_for_is_refused():
    reply = Reply(body=b"x", headers={"content-encoding": "br"})
    with serving(replying(reply)) as server, llamacpp(server.url) as scorer, pytest.raises(ProtocolError, match="'br'"):
        scorer.score("q", ["d"])


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"".join(b"x-%d: y\r\n" % i for i in range(20_000)), id="20,000 headers"),
        pytest.param(b"x: " + b"y" * 10**6 + b"\r\n", id="a megabyte of header"),
    ],
)
def test_huge_headers_are_refused(head):
    act = lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"content-length: 2\r\n\r\n[]")  # noqa: E731
    with raw_server(act) as url, llamacpp(url) as scorer, pytest.raises((ProtocolError, BackendUnavailableError)):
        scorer.score("q", ["d"])


def test_a_redirect_is_not_followed_and_the_key_stays():
    with serving(replying(GOOD)) as other:
        moved = Reply(307, {}, headers={"location": other.url + "/v1/rerank"})
        with (
            serving(replying(moved)) as server,
            llamacpp(server.url, api_key=KEY) as scorer,
            pytest.raises(BackendRejectedError, match="307, a redirect, which is not followed"),
        ):
            scorer.score("q", ["d"])

        assert other.requests == []
        assert server.posts[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "file:///etc/passwd", "host:8000", "http://", "http://user:pw@host", "http://host/?a=b", "http://h/#x",
     "http://host:99999", "http://ho st", "http://host\n", "http://[::1", "", None, 5, [], ["http://a", "gopher://b"]],
)  # fmt: skip
def test_only_plain_http_addresses_are_taken(url):
    with pytest.raises(InvalidInputError, match="url") as caught:
        HttpScorer(url)

    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.8", "[::ffff:10.0.0.8]", "0.0.0.0"]
)
def test_public_only_refuses_private_addresses(host):
    with (
        HttpScorer(f"http://{host}:9", dialect="tei", public_only=True) as scorer,
        pytest.raises(InvalidInputError, match="only public addresses are allowed here"),
    ):
        scorer.score("q", ["d"])


def test_public_only_connects_to_the_address_that_was_checked(monkeypatch):
    """The name is resolved once, and the connection is made to that very address with the name as Host."""
    with serving(replying(GOOD)) as server:
        port = server.url.rsplit(":", 1)[1]
        monkeypatch.setattr(transport, "public_address", lambda host, port: "127.0.0.1")
        with llamacpp(f"http://rerank.invalid:{port}", public_only=True) as scorer:
            scorer.score("q", ["d"])

    assert server.posts[0].headers["host"] == f"rerank.invalid:{port}"


# --- D13: other models, changed texts ----------------------------------------------------------------------------------


def test_another_models_name_is_a_warning(caplog):
    with serving(replying({"model": "other", **GOOD})) as server, llamacpp(server.url, model="mine") as scorer:
        scorer.score("q", ["d"])

    assert "scores of the model 'other' where 'mine' was asked for" in caplog.text


@pytest.mark.parametrize(
    "extra",
    [{"model": "other"}, {"results": [{"index": 0, "relevance_score": 0.5, "document": {"text": "changed"}}]}],
)
def test_strict_echo_makes_it_an_error(extra):
    with (
        serving(replying({**GOOD, **extra})) as server,
        llamacpp(server.url, model="mine", strict_echo=True) as scorer,
        pytest.raises(ProtocolError, match=r"the model 'other'|the text of document 0 changed"),
    ):
        scorer.score("q", ["d"])


# --- D14: some requests fail -------------------------------------------------------------------------------------------


def test_when_some_requests_fail_the_call_fails_and_carries_the_other_scores():
    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        return Reply(400, {"message": "bad"}) if "d2" in request.json["documents"] else results((0, 0.5), (1, 0.5))

    with (
        serving(handle) as server,
        llamacpp(server.url, max_batch=2) as scorer,
        pytest.raises(DocumentScoringError, match=r"2 of 6 documents.*documents\[2\]: BackendRejectedError") as caught,
    ):
        scorer.score("q", [f"d{i}" for i in range(6)])

    assert sorted(caught.value.failed) == [2, 3]
    assert list(caught.value.scores[[0, 1, 4, 5]]) == [0, 0, 0, 0]


def test_documents_of_failed_requests_come_last_in_their_first_order_and_are_marked():
    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        return Reply(400, {"message": "bad"}) if "d0" in request.json["documents"] else results((0, 0.2), (1, 0.9))

    with serving(handle) as server, llamacpp(server.url, max_batch=2) as scorer:
        hits = Reranker(scorer, on_error="last").rerank("q", [f"d{i}" for i in range(4)])

    assert [hit.index for hit in hits] == [3, 2, 0, 1]
    assert [hit.error is not None for hit in hits] == [False, False, True, True]


# --- the key -----------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_error_log_or_repr(caplog):
    echo = Reply(401, {"error": {"message": f"Incorrect API key provided: {KEY}", "type": "authentication_error"}})
    with (
        serving(replying(echo)) as server,
        llamacpp(server.url, api_key=KEY) as scorer,
        caplog.at_level(logging.DEBUG),
        pytest.raises(BackendRejectedError) as caught,
    ):
        scorer.score("q", ["d"])
    shown = [
        repr(scorer),
        str(scorer.config),
        str(caught.value),
        repr(caught.value.__dict__),
        caplog.text,
        scorer.name,
    ]

    assert server.posts[0].headers["authorization"] == f"Bearer {KEY}"
    assert not any(KEY in text for text in shown)


@pytest.mark.parametrize("key", ["", "with space", "line\nbreak", "schlüssel", 5])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key):
    with pytest.raises(InvalidInputError, match="api_key must be") as caught:
        HttpScorer("http://host", api_key=key)

    assert key == "" or str(key) not in str(caught.value)


def test_stub_servers_find_a_wrong_field():
    """The stubs refuse fields that are not their server's, so the dialect tests can fail."""
    stub = wire.Tei()
    with (
        serving(stub.handle) as server,
        HttpScorer(server.url, dialect="cohere", model="m") as scorer,
        pytest.raises(BackendRejectedError),
    ):
        scorer.score("q", ["d"])
