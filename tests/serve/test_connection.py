"""Broken, slow and hostile HTTP on a real socket: an error with a status, and nobody else waits for it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from eval.serving.load import memory_mib
from tests.serve.conftest import KEY, live_server
from tests.serve.process import ROOT, stub_server
from tests.serve.raw import Answer, connect, parse, read_all, read_one, request, talk
from tests.serve.stubs import Gated, Slow

BODY = json.dumps({"query": "q", "documents": ["a 1", "b 2"]}).encode()


@pytest.fixture(scope="module")
def hasty():
    """A server with short times and small limits."""
    with live_server(
        head_timeout_s=0.3, receive_timeout_s=0.3, write_timeout_s=0.5, keep_alive_s=1, max_body_bytes=100_000
    ) as server:
        yield server


def fast_request(server) -> int:
    return httpx2.post(
        f"{server.url}/v1/rerank", content=BODY, headers={"content-type": "application/json"}, timeout=60
    ).status_code


def test_a_plain_request_is_answered(hasty):
    answer = talk(hasty.port, request(BODY))

    assert answer.status == 200
    assert [result["index"] for result in answer.json()["results"]] == [1, 0]


def test_a_body_shorter_than_announced_is_408(hasty):
    answer = talk(hasty.port, request(BODY, Content_Length=str(len(BODY) + 10)))

    assert answer.status == 408
    assert answer.json()["error"]["code"] == "slow_body"
    assert b"connection: close" in answer.head.lower()


def test_a_body_longer_than_announced_is_cut_there(hasty):
    answer = talk(hasty.port, request(BODY + b"GET / HTTP/1.1", Content_Length=str(len(BODY))))

    assert answer.status == 200


def test_what_follows_a_body_that_is_longer_than_announced_is_400(hasty):
    answers = talk(hasty.port, request(BODY + b"\x00nonsense\r\n\r\n", Content_Length=str(len(BODY)), Connection=""))

    assert answers.status == 200
    assert b"HTTP/1.1 400" in answers.body


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param("Content-Length: 5\r\nTransfer-Encoding: chunked", id="both lengths"),
        pytest.param("Transfer-Encoding: chunked\r\nContent-Length: 5", id="both lengths, reversed"),
        pytest.param("Content-Length: 5\r\nContent-Length: 6", id="two lengths"),
        pytest.param("Content-Length: -1", id="negative"),
        pytest.param("Content-Length: 1e3", id="no number"),
        pytest.param("Content-Length: " + "9" * 40, id="absurd"),
        pytest.param("Transfer-Encoding: gzip, chunked", id="other encoding"),
        pytest.param("Transfer-Encoding: xchunked", id="unknown encoding"),
        pytest.param("bad name: x", id="space in a name"),
        pytest.param("x: \x00", id="NUL in a value"),
    ],
)
def test_ambiguous_framing_is_refused_and_the_connection_closed(hasty, headers):
    smuggled = "0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = talk(hasty.port, f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n{smuggled}")

    assert answer.status in (400, 408, 413)
    assert b"\r\nHTTP/1.1 " not in answer.body
    assert set(answer.json()) == {"detail", "message", "error", "request_id"}


@pytest.mark.parametrize(
    "line", ["", "GARBAGE", "GET", "GET / HTTP/9.9", "\x16\x03\x01\x02", "PRI * HTTP/2.0", "G T / HTTP/1.1"]
)
def test_what_is_no_http_is_400(hasty, line):
    answer = talk(hasty.port, f"{line}\r\nHost: x\r\n\r\n")

    assert answer.status == 400
    assert answer.json()["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("chunks", ["ZZ\r\n", "-1\r\n", "5\r\nhello!!", "ffffffffffffffffffff\r\n"])
def test_broken_chunks_are_400(hasty, chunks):
    answer = talk(
        hasty.port,
        f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}",
    )

    assert answer.status in (400, 408)


def chunked(body: bytes, size: int) -> bytes:
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    head = (
        b"POST /v1/rerank HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(("size", "status"), [(1, 400), (5, 400), (400, 200)])
def test_a_body_in_very_many_very_small_chunks_is_refused_unread(hasty, size, status):
    """Each chunk takes as long as hundreds of bytes: an 8 MB body in single bytes was 46 s of work."""
    body = json.dumps({"query": "q", "documents": ["word " * 15_000]}).encode()

    answer = talk(hasty.port, chunked(body, size))

    assert answer.status == status
    assert status == 200 or answer.json()["error"]["code"] == "chunks_too_small"


def test_chunks_without_end_are_cut_off_at_the_limit(hasty):
    with connect(hasty.port) as sock:
        sock.sendall(
            b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        stop = threading.Event()

        def pour() -> None:
            while not stop.is_set():
                try:
                    sock.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
                except OSError:
                    return

        pouring = threading.Thread(target=pour)
        pouring.start()
        first = sock.recv(4_096)
        stop.set()
        pouring.join()

    assert parse(first).status == 413


@pytest.mark.parametrize("headers", [10_000, 20_000])
def test_many_headers_are_refused(hasty, headers):
    head = "".join(f"h{i}: v\r\n" for i in range(headers))

    answer = talk(hasty.port, f"GET /health HTTP/1.1\r\nHost: x\r\n{head}\r\n")

    assert answer.status in (0, 400, 431)  # 0: closed while we were still sending


def test_one_huge_header_is_431(hasty):
    with connect(hasty.port) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nx: " + b"v" * 20_000)
        answer = read_all(sock)

    assert answer.status == 431
    assert answer.json()["error"]["code"] == "headers_too_large"


def test_a_body_above_the_limit_is_413_and_the_answer_is_seen(hasty):
    answer = talk(hasty.port, request(b"x" * 150_000))
    huge = talk(hasty.port, request(b"x" * 5_000_000))

    assert answer.status == 413
    assert huge.status in (0, 413)


def test_a_client_that_asks_before_sending_a_large_body_is_told_at_once(hasty):
    with connect(hasty.port) as sock:
        sock.sendall(request(b"", Content_Length="99999999", Expect="100-continue"))
        answer = read_all(sock)

    assert answer.status == 413


def test_a_client_that_asks_before_sending_is_told_to_go_on(hasty):
    with connect(hasty.port) as sock:
        sock.sendall(request(b"", Content_Length=str(len(BODY)), Expect="100-continue"))
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(BODY)
        assert read_all(sock).status == 200


def test_slow_headers_are_408(hasty):
    with connect(hasty.port) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
        answer = read_all(sock)

    assert answer.status == 408
    assert answer.json()["error"]["code"] == "slow_headers"


def test_headers_that_drip_do_not_stretch_the_deadline(hasty):
    with connect(hasty.port) as sock:
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    sock.sendall(b"x")
                except OSError:
                    return

        sock.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
        dripping = threading.Thread(target=drip)
        dripping.start()
        answer = read_all(sock)
        stop.set()
        dripping.join()

    assert answer.status == 408


def test_a_body_that_drips_does_not_stretch_the_deadline(hasty):
    with connect(hasty.port) as sock:
        sock.sendall(request(b"{", Content_Length="1000"))
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    sock.sendall(b" ")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        answer = read_all(sock)
        stop.set()
        dripping.join()

    assert answer.status == 408
    assert answer.json()["error"]["code"] == "slow_body"


def test_a_connection_that_says_nothing_is_closed(hasty):
    with connect(hasty.port) as sock:
        assert read_all(sock) == Answer(0, b"", b"")


def test_an_idle_connection_is_closed_after_a_while_and_a_second_slow_head_too(hasty):
    with connect(hasty.port) as sock:
        sock.sendall(request(BODY, Connection=""))
        answer = read_all(sock)
    with connect(hasty.port) as sock:
        sock.sendall(request(BODY, Connection=""))
        assert read_one(sock).status == 200
        sock.sendall(b"GET /heal")
        second = read_all(sock)

    assert answer.status == 200
    assert second.status == 408


def test_a_client_that_does_not_take_its_answer_is_cut_off():
    with live_server(write_timeout_s=0.3) as server, connect(server.port) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        body = json.dumps({"query": "q", "documents": ["x" * 7_000_000], "return_documents": True}).encode()
        sock.sendall(request(body, Connection=""))
        connections = server.server.server_state.connections
        while not connections:
            pass
        [connection] = connections
        closed = threading.Event()
        lost = connection.connection_lost
        connection.connection_lost = lambda exc: (lost(exc), closed.set())

        assert closed.wait(30)
        assert fast_request(server) == 200


def test_pipelined_requests_are_answered_in_order(hasty):
    first = request(BODY, Connection="")
    second = request(b'{"query": "q", "documents": ["c 3"]}')

    answer = talk(hasty.port, first + second)

    assert answer.body.count(b"HTTP/1.1 200") == 1
    assert answer.status == 200


def test_slow_clients_do_not_stop_a_fast_one(full):
    n_slow = 500 if full else 150
    with live_server(head_timeout_s=20, receive_timeout_s=20) as server:
        slow = [connect(server.port) for _ in range(n_slow)]
        for number, sock in enumerate(slow):
            sock.sendall(b"POST /v1/rerank HTTP/1.1\r\nx: " if number % 2 else request(BODY[:10], Content_Length="99"))

        assert fast_request(server) == 200
        for sock in slow:
            sock.close()


def test_too_many_connections_are_turned_away_and_places_become_free():
    with live_server(max_connections=4, keep_alive_s=30) as server:
        held = [connect(server.port) for _ in range(4)]
        for sock in held:
            sock.sendall(b"G")
        while len(server.server.server_state.connections) < 4:
            pass

        assert talk(server.port, request(BODY)).status == 503
        for sock in held:
            sock.close()
        while talk(server.port, request(BODY)).status != 200:
            pass


def test_running_out_of_file_descriptors_is_survived():
    command = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
        "sys.argv[1:] = ['{\"scorer\": \"Oracle\"}']; runpy.run_module('tests.serve.process', run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        port = next(json.loads(line)["port"] for line in process.stderr if '"listening"' in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        flood = [connect(port) for _ in range(200)]
        for sock in flood:
            sock.close()
        while talk(port, request(path="/health/ready", method="GET")).status != 200:
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def health_seconds_while(port: int, work: threading.Thread) -> list[float]:
    """Ask for health again and again until the work is done."""
    seconds = []
    with connect(port) as sock:
        work.start()
        while work.is_alive():
            start = time.perf_counter()
            sock.sendall(request(path="/health/live", method="GET", Connection=""))
            assert read_one(sock).status == 200
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)


def test_a_large_document_is_cut_and_health_stays_quick(full):
    """In a process of its own; by `--full` the best of three tries counts, since a busy machine makes it only slower."""
    body = json.dumps({"query": "q", "documents": [("x" * 999 + " ") * 8_000], "return_details": True}).encode()
    p99 = []
    with stub_server("Oracle") as server:
        for _ in range(3 if full else 1):
            answers: list[Answer] = []
            asking = threading.Thread(
                target=lambda to=answers: to.extend(talk(server.port, request(body)) for _ in "12345")
            )
            seconds = health_seconds_while(server.port, asking)
            p99.append(seconds[int(0.99 * len(seconds))])
            assert [answer.status for answer in answers] == [200] * 5
            assert answers[0].json()["results"][0]["truncated"] is True

    assert not full or min(p99) < 0.1


def test_hostile_heads_leave_the_memory_flat():
    """A hundred heads of two megabytes each: none of it is kept."""
    with stub_server("Oracle") as server:
        talk(server.port, request(BODY))
        before = memory_mib(server.process.pid)
        for _ in range(100):
            with connect(server.port) as sock, contextlib.suppress(OSError):
                sock.sendall(b"GET /health HTTP/1.1\r\n" + b"name: value\r\n" * 150_000)
        assert talk(server.port, request(BODY)).status == 200
        after = memory_mib(server.process.pid)

    assert after["peak"] - before["now"] < 20


def test_an_answer_does_not_wait_for_the_clients_acknowledgement():
    """Head and body are two writes; with Nagle's algorithm on, the second would come up to 40 ms late."""
    with live_server() as server, connect(server.port) as sock:
        sock.sendall(request(BODY, Connection=""))
        read_one(sock)
        [connection] = server.server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")

        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_has_ended_its_own_side_still_gets_its_answer():
    """As `curl --no-keepalive`, `nc -N` and scripts with `shutdown(SHUT_WR)` do."""
    with live_server(lambda: Slow(0.3)) as server, connect(server.port) as sock:
        sock.sendall(request(BODY, Connection=""))
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)

    assert answer.status == 200
    assert [result["index"] for result in answer.json()["results"]] == [1, 0]


def test_a_client_that_has_ended_its_side_in_the_middle_of_its_body_is_let_go():
    with live_server() as server, connect(server.port) as sock:
        sock.sendall(request(BODY[:10], Content_Length=str(len(BODY)), Connection=""))
        sock.shutdown(socket.SHUT_WR)

        assert read_all(sock) == Answer(0, b"", b"")


def test_a_client_that_has_left_is_still_noticed_and_its_work_cancelled():
    scorer = Gated()
    with live_server(lambda: scorer) as server:
        with connect(server.port) as sock:
            sock.sendall(request(BODY, Connection=""))
            while not scorer.waiting:
                pass
        while scorer.waiting:
            pass

        assert fast_health(server) == 200


def fast_health(server) -> int:
    return talk(server.port, request(path="/health", method="GET")).status


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        pytest.param(b"x" * 60_000, {"Authorization": "Bearer wrong"}, 401, id="no key"),
        pytest.param(b"x" * 60_000, {"Authorization": f"Bearer {KEY}", "Content-Encoding": "gzip"}, 415, id="encoding"),
        pytest.param(b"x" * 150_000, {"Authorization": f"Bearer {KEY}"}, 413, id="too large"),
        pytest.param(
            b"x" * 60_000, {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}, 415, id="no JSON"
        ),
    ],
)
def test_an_early_error_reads_the_rest_of_the_body_so_that_the_connection_goes_on(body, headers, status):
    """Unread bytes would be taken for the next request, or reset the connection before the answer is seen."""
    good = request(BODY, Connection="", Authorization=f"Bearer {KEY}")
    with live_server(keys=(KEY,), max_body_bytes=100_000) as server, connect(server.port) as sock:
        for _ in range(2):
            sock.sendall(request(body, Connection="", **headers))
            assert read_one(sock).status == status
        sock.sendall(good)
        assert read_one(sock).status == 200


@pytest.mark.parametrize(
    "path", ["/", "/health", "/health/live", "/health/ready", "/v1/models", "/metrics", "/docs", "/playground/samples"]
)
def test_head_is_answered_as_get_without_the_body(hasty, path):
    """Container health checks by `wget --spider` and load balancers ask so."""
    got = talk(hasty.port, request(path=path, method="GET"))
    answer = talk(hasty.port, request(path=path, method="HEAD"))

    assert (answer.status, answer.body) == (200, b"")
    assert f"content-length: {len(got.body)}".encode() in answer.head.lower() or path == "/metrics"


def test_an_early_error_comes_only_when_the_body_is_read_also_where_the_connection_is_to_close():
    """Closed with bytes unread, a connection is reset, and the client that still sends never sees why."""
    asked = request(b"x" * 60_000, Authorization="Bearer wrong")
    with live_server(keys=(KEY,), max_body_bytes=100_000) as server, connect(server.port) as sock:
        sock.sendall(asked[:30_000])
        sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(30)
        sock.sendall(asked[30_000:])

        assert read_all(sock).status == 401
