"""Logs that cannot be forged and tell no texts, counters that cannot be blown up, and a description that is true."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from qwen_rerank.scorers.cached import CachedScorer
from qwen_rerank.serve import telemetry
from qwen_rerank.testing import OverlapScorer
from tests.serve.conftest import KEY, app_client
from tests.serve.stubs import SECRET, Faulty


@pytest.fixture
def lines():
    """Return what has been logged, one parsed line an event."""
    stream = io.StringIO()
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    handlers, disabled = root.handlers[:], access.disabled
    levels = {logger: logger.level for logger in map(logging.getLogger, (None, "qwen_rerank", "uvicorn"))}
    telemetry.configure(level="DEBUG", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], access.disabled = handlers, disabled
    for logger, level in levels.items():
        logger.setLevel(level)


async def test_a_request_is_one_line_without_its_texts(lines):
    async with app_client(keys=(KEY,)) as client:
        await client.post(
            "/v1/rerank?token=SECRET",
            json={"query": "SECRET query", "documents": ["SECRET text 1"], "instruction": "SECRET"},
            headers={"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"},
        )
        await client.post("/v1/rerank", json={"query": "SECRET", "documents": ["a", None]}, headers={"api-key": KEY})

    first, second = (line for line in lines() if line["message"] == "request")
    assert (first["request_id"], first["status"], first["documents"], first["who"]) == ("mine-1", 200, 1, "key-1")
    assert (second["status"], second["code"]) == (422, "text")
    assert "SECRET" not in json.dumps(lines())
    assert KEY not in json.dumps(lines())


@pytest.mark.parametrize("hostile", ["x\r\nforged: line", "\x1b[31mred", "A" * 60_000, "ключ", "\u2028"])
async def test_hostile_names_stay_in_their_line_and_are_cut(lines, hostile):
    async with app_client() as client:
        await client.get("/" + hostile.replace("\r\n", "%0d%0a").replace("\x1b", "%1b"))
        await client.get("/health/live", headers=[(b"x-request-id", hostile.encode("utf-8", "replace")[:9_000])])

    requests = [line for line in lines() if line["message"] == "request"]
    assert len(requests) == 2
    assert all(len(str(value)) <= telemetry.MAX_CHARS for line in requests for value in line.values())
    assert len(requests[1]["request_id"]) <= 64


async def test_scores_that_were_kept_are_counted():
    """A repeated request is answered alike, tokens too, and its documents are hits."""
    async with app_client(CachedScorer(OverlapScorer())) as client:
        cache = client.backend.cache
        hits, misses = cache.hits, cache.misses  # of the check at the start
        answers = [(await client.rerank(documents=["a 1", "q 2"])).json() for _ in range(2)]
        text = (await client.get("/metrics")).text

    assert answers[0]["results"] == answers[1]["results"]
    assert answers[0]["usage"] == answers[1]["usage"]
    assert f"qwen_rerank_cache_hits {float(hits + 2)}" in text
    assert f"qwen_rerank_cache_misses {float(misses + 2)}" in text


async def test_a_trace_has_its_places_and_no_values(lines):
    async with app_client(Faulty()) as client:
        await client.rerank(documents=["explode"])

    [error] = [line for line in lines() if line["level"] == "error"]
    assert "stubs.py" in error["trace"]
    assert error["trace"].startswith("RuntimeError\n")
    assert SECRET not in json.dumps(error)


async def test_counters_count(client):
    await client.rerank(documents=["a", "b", "w " * 200])
    text = (await client.get("/metrics")).text

    assert 'qwen_rerank_requests_total{route="/v1/rerank",status="200"} 1.0' in text
    assert "qwen_rerank_documents_total 3.0" in text
    assert "qwen_rerank_truncated_documents_total 1.0" in text
    assert "qwen_rerank_ready 1.0" in text
    assert "qwen_rerank_queued_tokens 0.0" in text


async def test_hostile_paths_and_models_make_no_new_series(full):
    async with app_client() as client:

        async def series() -> set[str]:
            text = (await client.get("/metrics")).text
            return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

        await client.get("/nowhere")
        await client.rerank(model="unknown")
        await series()
        before = await series()
        for number in range(10_000 if full else 300):
            await client.get(f"/path-{number}")
            await client.rerank(model=f"model-{number}")

        assert await series() == before


async def test_the_description_is_valid_and_names_every_route(client):
    description = (await client.get("/openapi.json")).json()

    assert {"/v1/rerank", "/v2/rerank", "/rerank", "/score", "/v1/models", "/metrics"} <= set(description["paths"])
    operations = [operation for path in description["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    references = json.dumps(description).split('"$ref": "#/components/schemas/')[1:]
    assert {part.partition('"')[0] for part in references} <= set(description["components"]["schemas"])


async def test_the_description_says_where_a_key_is_needed():
    async with app_client(keys=(KEY,)) as client:
        description = (await client.get("/openapi.json", headers={"api-key": KEY})).json()

    assert description["paths"]["/v1/rerank"]["post"]["security"] == [{"key": []}]
    assert "security" not in description["paths"]["/health/live"]["get"]


async def test_the_routes_page_needs_nothing_from_elsewhere(client):
    page = await client.get("/docs")

    assert "<code>/v1/rerank</code>" in page.text
    assert "`" not in page.text.split("<details>")[0]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_person_at_a_terminal_sees_sentences(lines):
    screen = Terminal()
    telemetry.configure(stream=screen)
    logging.getLogger("qwen_rerank.serve").info("listening", extra={"event": {"url": "http://127.0.0.1:8080"}})
    async with app_client() as client:
        await client.rerank()
        await client.get("/%1b[31m")

    text = screen.getvalue()
    assert "Listening on http://127.0.0.1:8080: a page to try it at /" in text
    assert "Loading the model; requests get 503 until it is ready." in text
    assert re.search(r"Ready in [0-9.]+ s \(", text)
    assert re.search(r"POST /v1/rerank 200 in [0-9.]+ ms\n", text)
    assert not {"{", "\x1b"} & set(text)
