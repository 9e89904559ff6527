"""The process: it drains at SIGTERM, ends at the second, restarts when killed, and does not hang with its model."""

from __future__ import annotations

import signal
import socket
import threading

import httpx2
import pytest

from qwen_rerank.errors import ModelError
from qwen_rerank.scorers.cached import CachedScorer
from qwen_rerank.serve import process
from qwen_rerank.serve.selfcheck import check_scorer
from tests.serve.process import stub_server
from tests.serve.raw import connect, read_one, request, talk

BODY = b'{"query": "q", "documents": ["a 1", "b 2"]}'


def ask(url: str, results: list[object]) -> None:
    try:
        results.append(
            httpx2.post(f"{url}/v1/rerank", content=BODY, headers={"content-type": "application/json"}, timeout=60)
        )
    except httpx2.TransportError as error:
        results.append(error)


def admitted(server) -> float:
    text = httpx2.get(f"{server.url}/metrics").text
    return float(text.partition("\nqwen_rerank_admitted_requests ")[2].partition("\n")[0])


def test_sigterm_answers_what_is_admitted_and_exits_with_0(tmp_path):
    gate = tmp_path / "open"
    with stub_server("FileGated", arguments=[str(gate)]) as server:
        results: list[object] = []
        asking = [threading.Thread(target=ask, args=(server.url, results)) for _ in range(8)]
        for thread in asking:
            thread.start()
        while admitted(server) < 8:
            pass
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(state="draining")
        gate.touch()
        status = server.process.wait(30)
        for thread in asking:
            thread.join()

    assert status == 0
    assert [response.status_code for response in results] == [200] * 8


def test_what_stays_for_good_is_no_work_for_the_garbage_collector():
    """A full pass over all libraries would stop every request for a tenth of a second, again and again."""
    with stub_server("Frozen") as server:
        body = {"query": "q", "documents": ["frozen"], "raw_scores": True}
        [result] = httpx2.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()["results"]

    assert result["relevance_score"] > 10_000


def test_sigterm_turns_readiness_red_at_once_and_closes_the_port_after_the_delay():
    settings = {"drain_delay_s": 2.0}  # within which a busy machine, too, asks four times
    with stub_server("Oracle", settings=settings) as server, connect(server.port) as idle:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(state="draining")
        ready, live = (talk(server.port, request(path=f"/health/{end}", method="GET")) for end in ("ready", "live"))
        refused = talk(server.port, request(BODY))
        idle.sendall(request(path="/health/ready", method="GET", Connection=""))
        on_old_connection = read_one(idle).status
        status = server.process.wait(30)

    assert (ready.status, live.status, refused.status, on_old_connection) == (503, 200, 503, 503)
    assert b"retry-after: " in refused.head.lower()
    assert status == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health/live")


def test_a_second_sigterm_ends_at_once_and_exits_with_143():
    with stub_server("Slow", arguments=[3_600]) as server:
        results: list[object] = []
        asking = threading.Thread(target=ask, args=(server.url, results))
        asking.start()
        while admitted(server) < 1:
            pass
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(state="draining")
        status = server.stop()
        asking.join()

    assert status == 143


def test_when_the_grace_is_over_the_rest_is_told_so():
    with stub_server("Slow", arguments=[3_600], settings={"grace_s": 1}) as server:
        results: list[object] = []
        asking = threading.Thread(target=ask, args=(server.url, results))
        asking.start()
        while admitted(server) < 1:
            pass
        status = server.stop()
        asking.join()

    assert status == 0
    assert results[0].status_code == 503
    assert results[0].json()["error"]["code"] == "shut_down"


def test_a_model_that_hangs_ends_the_process_with_70_after_telling_its_clients():
    with stub_server("Hung", settings={"watchdog_s": 0.5}) as server:
        results: list[object] = []
        ask(server.url, results)
        status = server.process.wait(30)
        server.wait_for(state="stalled")

    assert results[0].status_code == 504
    assert status == 70


def test_a_model_that_fails_its_check_keeps_the_server_red():
    with stub_server("Constant", ready=False) as server:
        server.wait_for(state="failed")
        ready = httpx2.get(f"{server.url}/health/ready")
        live = httpx2.get(f"{server.url}/health/live")
        results: list[object] = []
        ask(server.url, results)

    assert (ready.status_code, live.status_code, results[0].status_code) == (503, 200, 503)


def test_a_cache_hides_nothing_from_the_self_check():
    """The score alone is computed, and not the batch's out of the cache."""

    class Uneven:
        name = fingerprint = "uneven"

        def score(self, query, documents):
            return [float(len(documents) + i) for i in range(len(documents))]

    with pytest.raises(ModelError, match="differently in a batch"):
        check_scorer(CachedScorer(Uneven(), cache=100))


@pytest.mark.parametrize("moment", ["while it waits to start again", "while a child is being started"])
def test_a_supervisor_that_is_told_to_stop_starts_nothing_more(monkeypatch, moment):
    supervisor = process._Supervisor(socket.socket())
    told = []

    class Child:
        def __init__(self, *_, **__):
            told.append("started")
            if "child" in moment:
                supervisor._forward(signal.SIGTERM, None)

        send_signal = told.append

        def wait(self):
            return 1

    monkeypatch.setattr(process.subprocess, "Popen", Child)
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    monkeypatch.setattr(process.time, "sleep", lambda _: supervisor._forward(signal.SIGTERM, None))
    status = supervisor.run()

    assert told == ["started", signal.SIGTERM]
    assert status == (1 if "child" in moment else 0)
