"""Servers and addresses that mean harm; and the key stays where it belongs."""

from __future__ import annotations

import gzip
import json

import pytest

from qwen_rerank.errors import (
    BackendRejectedError,
    BackendUnavailableError,
    InvalidInputError,
    ProtocolError,
)
from qwen_rerank.scorers.http import HttpScorer, transport
from tests.scorers.http.calls import GOOD, KEY, llamacpp, replying
from tests.scorers.http.stub import Reply, raw_server, serving

# --- hostile servers -------------------------------------------------------------------------------------------------


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


# --- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "with space", "line\nbreak", "schlüssel", 5])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key):
    with pytest.raises(InvalidInputError, match="api_key must be") as caught:
        HttpScorer("http://host", api_key=key)

    assert key == "" or str(key) not in str(caught.value)
