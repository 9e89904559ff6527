"""Many clients at once: each its own answer, early refusals, dropped work, and counters that return to zero."""

from __future__ import annotations

import asyncio
import gc
import logging
import random

import httpx2
import numpy as np
import pytest

from qwen_rerank.serve.app import create_app
from qwen_rerank.serve.settings import ServeSettings
from tests.serve.conftest import KEY, OTHER_KEY, app_client, live_server
from tests.serve.stubs import Gated, Oracle, Slow, Stepped


def counters(backend) -> tuple[int, int, int, int]:
    queue = backend.queue
    return queue.queued_tokens, queue.running_tokens, queue.running_slots, queue.requests


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def no_unretrieved_errors(caplog):
    """No task may end with an error that nobody looked at."""
    caplog.set_level(logging.WARNING, logger="asyncio")
    yield
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_many_clients_at_once_each_get_exactly_their_own_answer(full):
    """Every text ends with a number that only its client knows; the answer's order and scores must be those."""
    n_clients = 500 if full else 100
    with live_server(lambda: Slow(0.001), max_queue_wait_s=1e6) as server:

        async def one(client: httpx2.AsyncClient, number: int) -> None:
            chance = random.Random(number)
            values = [round(chance.uniform(-9, 9), 3) for _ in range(chance.randint(1, 8))]
            body = {"query": f"q {number}", "documents": [f"{number} {value}" for value in values], "raw_scores": True}
            response = await client.post("/v1/rerank", json=body, headers={"x-request-id": f"c-{number}"})
            assert response.status_code == 200, response.text
            results = response.json()["results"]
            expected = sorted(range(len(values)), key=lambda i: -values[i])
            assert [result["index"] for result in results] == expected
            assert [result["relevance_score"] for result in results] == pytest.approx([values[i] for i in expected])
            assert response.headers["x-request-id"] == f"c-{number}"

        limits = httpx2.Limits(max_connections=n_clients)
        async with httpx2.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
            await asyncio.gather(*(one(client, number) for number in range(n_clients)))

        assert counters(server.backend) == (0, 0, 0, 0)


async def test_overload_is_refused_before_any_work_and_the_rest_is_answered():
    scorer = Gated()
    async with app_client(scorer, max_queued_requests=10, patience_requests=1) as client:
        checked = len(scorer.scored)
        asking = [asyncio.create_task(client.rerank(documents=[f"x {i}"])) for i in range(40)]
        await until(lambda: client.backend.queue.requests == 10 and sum(task.done() for task in asking) == 30)
        refused = [task.result() for task in asking if task.done()]
        scorer.gate.set()
        statuses = sorted(response.status_code for response in await asyncio.gather(*asking))

        assert statuses == [200] * 10 + [429] * 30
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert len(scorer.scored) - checked == 10
        assert (await client.rerank()).status_code == 200


async def test_the_bodies_in_memory_are_bounded():
    app = create_app(Oracle(), settings=ServeSettings(max_buffered_bytes=1_000))
    async with app.router.lifespan_context(app):
        await app.state.backend.wait_loaded()
        first = asyncio.create_task(ask_in_pieces(app, [b"x" * 900], forever=True))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second = await ask_in_pieces(app, [b"y" * 900])
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

        assert second == 429
        assert await ask_in_pieces(app, [b'{"query":"q","documents":["a"]}' + b" " * 900]) == 200


async def ask_in_pieces(app, pieces: list[bytes], *, forever: bool = False) -> int:
    """Send a body piece by piece as ASGI does; return the status."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if not forever:
        messages.append({"type": "http.request", "body": b"", "more_body": False})
    status = 0

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message):
        nonlocal status
        status = message.get("status", status)

    await app(scope(), receive, send)
    return status


def scope() -> dict:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/rerank",
        "raw_path": b"/v1/rerank",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }


async def test_a_request_past_its_deadline_is_504_and_never_computed():
    scorer = Gated()
    async with app_client(scorer, max_running_tokens=1) as client:
        first = asyncio.create_task(client.rerank(documents=["first 1"]))
        await until(lambda: scorer.waiting)
        body = {"query": "q", "documents": ["late 1"]}
        late = await client.post("/v1/rerank", json=body, headers={"x-request-timeout-ms": "50"})
        scorer.gate.set()

        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert (await first).status_code == 200
        assert "late 1" not in scorer.scored
        assert counters(client.backend) == (0, 0, 0, 0)


async def test_a_request_is_made_ready_in_its_first_slot_and_not_before(monkeypatch):
    """Tokenizing waits its turn too, so a flood of long requests cannot delay everybody else's."""
    scorer, made_ready = Gated(), []
    prepare = scorer.prepare
    monkeypatch.setattr(scorer, "prepare", lambda request: made_ready.append(request.query) or prepare(request))
    async with app_client(scorer, max_running_tokens=1) as client:
        first = asyncio.create_task(client.rerank(query="first", documents=["a"]))
        await until(lambda: scorer.waiting)
        second = asyncio.create_task(client.rerank(query="second", documents=["b"]))
        await until(lambda: waiting_slots(client.backend) == 1)
        before = list(made_ready)
        scorer.gate.set()
        await asyncio.gather(first, second)

    assert before == ["first"]
    assert made_ready == ["first", "second"]


@pytest.mark.parametrize("value", ["", "-5", "1.5", "soon", "9" * 12, "٣"])
async def test_a_deadline_that_is_no_number_is_400(client, value):
    headers = [(b"x-request-timeout-ms", value.encode())]
    response = await client.post("/v1/rerank", json={"query": "q", "documents": ["a"]}, headers=headers)

    assert response.status_code == 400


async def test_a_client_cannot_stretch_the_servers_deadline():
    async with app_client(Gated(), request_timeout_s=0.02) as client:
        body = {"query": "q", "documents": ["a"]}
        response = await client.post("/v1/rerank", json=body, headers={"x-request-timeout-ms": "60000"})

    assert response.status_code == 504


async def leave_early(app, *, after: asyncio.Event) -> None:
    """Send a whole request, then leave."""
    messages = [{"type": "http.request", "body": b'{"query":"q","documents":["gone 1"]}', "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await after.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(f"nothing should be sent to a client that left: {message}")

    await app(scope(), receive, send)


async def test_work_of_clients_that_left_is_dropped(full):
    """Most leave while queued, some while running; nothing of theirs is computed, and all counters return to zero."""
    n_clients = 10_000 if full else 500
    scorer = Gated()
    app = create_app(
        scorer, settings=ServeSettings(max_running_tokens=20, max_queued_requests=20_000, max_queue_wait_s=1e6)
    )
    async with app.router.lifespan_context(app):
        backend = app.state.backend
        await backend.wait_loaded()
        for _ in range(n_clients // 500):
            leave = asyncio.Event()
            leaving = [asyncio.create_task(leave_early(app, after=leave)) for _ in range(500)]
            await until(lambda: scorer.waiting and backend.queue.requests == 500)
            leave.set()
            await asyncio.gather(*leaving)
            assert counters(backend) == (0, 0, 0, 0)
            assert scorer.waiting == 0

    assert "gone 1" not in scorer.scored


def test_a_real_client_that_hangs_up_is_noticed():
    scorer = Gated()
    with live_server(lambda: scorer) as server:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{server.url}/v1/rerank", json={"query": "q", "documents": ["a"]}, timeout=0.2)
        while server.backend.queue.requests:
            pass

        assert scorer.waiting == 0


def waiting_slots(backend) -> int:
    return sum(len(tenant.waiting) for tenant in backend.queue._tenants.values())


async def step_until_scored(scorer: Stepped, text: str) -> int:
    """Let call after call finish until `text` is scored; return how many texts that took."""
    before = len(scorer.scored)
    while text not in scorer.scored:
        n_scored = len(scorer.scored)
        scorer.steps.release()
        await until(lambda n=n_scored: len(scorer.scored) > n)
    return len(scorer.scored) - before


async def finish(scorer: Stepped, tasks: list[asyncio.Task]) -> list[int]:
    for _ in range(2_000):
        scorer.steps.release()
    return [response.status_code for response in await asyncio.gather(*tasks)]


async def test_one_key_that_floods_leaves_the_other_its_share():
    scorer = Stepped()
    settings = {"max_running_tokens": 3, "max_queued_requests": 200, "patience_requests": 1}
    async with app_client(scorer, keys=(KEY, OTHER_KEY), **settings) as client:

        def ask(key: str, text: str) -> asyncio.Task:
            body = {"query": "q", "documents": [text]}
            return asyncio.create_task(client.post("/v1/rerank", json=body, headers={"authorization": f"Bearer {key}"}))

        tasks = [ask(KEY, f"flood {i}") for i in range(90)]
        await until(lambda: waiting_slots(client.backend) == 89)
        tasks += [ask(OTHER_KEY, f"quiet {i}") for i in range(5)]
        await until(lambda: waiting_slots(client.backend) == 94)
        waited = max([await step_until_scored(scorer, f"quiet {i}") for i in range(5)])

        assert waited <= 3
        assert set(await finish(scorer, tasks)) == {200}


async def test_a_small_request_passes_a_large_one_that_came_before():
    scorer = Stepped()
    async with app_client(scorer, max_running_tokens=40) as client:
        large = asyncio.create_task(client.rerank(documents=[f"large {i}" for i in range(900)]))
        await until(lambda: waiting_slots(client.backend) > 250)
        queued = waiting_slots(client.backend)
        small = asyncio.create_task(client.rerank(documents=["small 1"]))
        await until(lambda: waiting_slots(client.backend) > queued)

        assert await step_until_scored(scorer, "small 1") <= 24  # of 900
        assert await finish(scorer, [large, small]) == [200, 200]


async def test_ten_thousand_documents_are_each_in_their_place():
    chance = random.Random(6)
    values = [round(chance.uniform(-9, 9), 4) for _ in range(10_000)]
    async with app_client(max_documents=10_000) as client:
        answer = await client.rerank(documents=[f"d {value}" for value in values], raw_scores=True)
        too_many = await client.rerank(documents=["d"] * 10_001)

    results = answer.json()["results"]
    assert [result["index"] for result in results] == sorted(range(10_000), key=lambda i: -np.float32(values[i]))
    assert [result["relevance_score"] for result in results] == pytest.approx(sorted(values, reverse=True), abs=1e-5)
    assert too_many.status_code == 413


async def test_requests_before_the_model_is_ready_are_503_and_do_not_queue():
    loading = asyncio.Event()
    loop = asyncio.get_running_loop()

    def load() -> Oracle:
        asyncio.run_coroutine_threadsafe(loading.wait(), loop).result()
        return Oracle()

    app = create_app(load=load)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client,
    ):
        body = {"query": "q", "documents": ["a"]}
        answers = [await client.post("/v1/rerank", json=body) for _ in range(50)] + [await client.get("/health/ready")]
        live = await client.get("/health/live")
        assert counters(app.state.backend) == (0, 0, 0, 0)
        loading.set()
        await app.state.backend.wait_loaded()
        later = await client.post("/v1/rerank", json=body)

    assert {answer.status_code for answer in answers} == {503}
    assert all("retry-after" in answer.headers for answer in answers)
    assert (live.status_code, later.status_code) == (200, 200)
