"""No answer of a back end costs much more than it weighs: what it takes to read is known before anything of it is built."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import random
import threading
import time
import tracemalloc
from collections import Counter

import pytest

from qwen_rerank.errors import ProtocolError, RerankError
from qwen_rerank.scorers.http import HttpScorer, answers, transport
from qwen_rerank.scorers.http.answers import HttpAnswer
from qwen_rerank.scorers.http.dialects import DIALECTS
from tests.scorers.http.calls import GOOD, KEY, llamacpp, replying, results
from tests.scorers.http.stub import Reply, raw_server, serving
from tests.serve import costly

MOST_CPU_S = 1.0
MOST_LOOP_CPU_S = 0.05
MOST_MEMORY = 8  # times the answer's size
SMALL_BYTES = 16 << 20  # as much is left to any answer: a hundred thousand values cost that, however short they are
N_DOCUMENTS = 20
LARGEST = 32 << 20  # as `max_answer_bytes` has it by default


class Canned:
    """Stands in place of all connections: every request is answered with one body, without a socket."""

    def __init__(self) -> None:
        self.answer = (200, b"")

    async def send(self, own, live, endpoint, method, path, body) -> HttpAnswer:
        status, content = self.answer
        return HttpAnswer(endpoint.url + path, status, {}, content, own._secrets)

    def ask(self, scorer: HttpScorer, answer: tuple[int, bytes]) -> tuple[str, float]:
        """Return what became of a request, and the CPU time that the event loop's thread spent on it."""
        self.answer, scorer._session = answer, None
        # One document, where a refusal of several would be followed by requests for fewer.
        texts = [f"d{i}" for i in range(N_DOCUMENTS if answer[0] == 200 else 1)]
        before = loop_cpu_s(scorer)
        try:
            outcome = "failed" if scorer.score_details("q", texts).errors else "scored"
        except RerankError as exc:
            outcome = type(exc).__name__
        return outcome, loop_cpu_s(scorer) - before


def loop_cpu_s(scorer: HttpScorer) -> float:
    async def thread_time() -> float:
        return time.thread_time()

    return scorer._transport.submit(thread_time).result()


@pytest.fixture
def canned(monkeypatch):
    canned = Canned()
    monkeypatch.setattr(transport, "RETRIES", 0)
    monkeypatch.setattr(transport.Transport, "_once", lambda own, *args: canned.send(own, *args))
    return canned


@pytest.fixture
def scorers():
    """A scorer of each dialect, and one that asks first what the server is."""
    names = [name for name in DIALECTS if name != "qwen-rerank"]
    scorers = [HttpScorer("http://127.0.0.1:9", dialect=name, model="m", api_key=KEY) for name in names]
    scorers.append(HttpScorer("http://127.0.0.1:9", api_key=KEY))
    yield scorers
    for scorer in scorers:
        scorer.close()


def test_a_costly_answer_is_used_or_refused_within_bounds(full, canned, scorers):
    """Of some answers their memory, and by `--full` their CPU time as well, from the last byte until the scores are there."""
    chance = random.Random(17)
    sizes = [*[200_000] * 16, 2_000_000, 2_000_000, 8_000_000, LARGEST - 4_096] if full else [*[5_000] * 99, 900_000]
    worst: dict[str, tuple[float, str]] = {"cpu_s": (0, ""), "loop_cpu_s": (0, ""), "memory": (0, "")}
    outcomes: Counter[str] = Counter()
    for scorer in scorers:
        canned.ask(scorer, (200, json.dumps(GOOD).encode()))
    gc.freeze()
    for number in range(10_000 if full else 300):
        scorer = chance.choice(scorers)
        kind, status, body = costly.answer(chance, chance.choice(sizes), N_DOCUMENTS)
        answer = (status, body[:LARGEST])
        start = time.process_time()
        outcome, loop_s = canned.ask(scorer, answer)
        figures = {"cpu_s": time.process_time() - start, "loop_cpu_s": loop_s}
        outcomes[outcome] += 1
        if number % 20 == 0 or len(answer[1]) > 500_000:  # counting memory takes several times as long
            tracemalloc.start()
            canned.ask(scorer, answer)
            figures["memory"] = tracemalloc.get_traced_memory()[1] / max(len(answer[1]), SMALL_BYTES // MOST_MEMORY)
            tracemalloc.stop()
        place = f"{kind}, number {number} at {scorer.name}: {answer[0]}, {answer[1][:60]!r}, {len(answer[1])} bytes"
        worst = {name: max(worst[name], (figures.get(name, 0), place)) for name in worst}
    print(f"\ncostly answers: {dict(outcomes.most_common())}, worst {json.dumps(worst, indent=1)}")

    assert worst["memory"][0] <= MOST_MEMORY - 1, worst["memory"]  # the answer itself came before
    assert {"scored", "ProtocolError", "BackendRejectedError"} <= set(outcomes) <= {
        "scored", "ProtocolError", "BackendRejectedError", "BackendUnavailableError", "InvalidInputError",
    }  # fmt: skip
    assert not full or worst["cpu_s"][0] <= MOST_CPU_S, worst["cpu_s"]
    assert not full or worst["loop_cpu_s"][0] <= MOST_LOOP_CPU_S, worst["loop_cpu_s"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(b'{"a":[' + b'"",' * 100_001 + b'""]}', "more than 100000 values", id="strings"),
        pytest.param(b"[" + b"1," * 100_001 + b"1]", "more than 100000 values", id="numbers"),
        pytest.param(b'{"a":[' + b"{}," * 60_000 + b"{}]}", "more than 100000 values", id="objects"),
        pytest.param(b'{"a":' + b"9" * 401 + b"}", "more than 400 digits", id="digits"),
        pytest.param(b"[" * 65 + b"]" * 65, "deeper than 64 levels", id="depth"),
    ],
)
def test_an_answer_too_complex_is_refused_before_a_value_is_built(monkeypatch, body, says):
    monkeypatch.setattr(answers, "from_json", lambda *_, **__: pytest.fail("values were built"))

    with pytest.raises(ProtocolError, match=says):
        answers.parse(HttpAnswer("http://a", 200, {}, body))


def test_a_large_answer_is_read_beside_the_event_loop(monkeypatch):
    threads, real = [], answers.from_json

    def noted(*args, **options):
        threads.append(threading.current_thread().name)
        return real(*args, **options)

    monkeypatch.setattr(answers, "from_json", noted)
    large = {**results((0, 0.5)), "more": "x" * 300_000}
    with serving(replying(Reply(value=large), Reply(value=GOOD))) as server, llamacpp(server.url) as scorer:
        scorer.score("q", ["d"])
        first = threads[-1]
        scorer.score("q", ["d"])

    assert not first.startswith("qwen-rerank-http")
    assert threads[-1].startswith("qwen-rerank-http")


def test_an_error_that_is_kept_keeps_nothing_of_what_was_read(canned, scorers):
    body = b'{"data":["' + b"x" * 2_000_000 + "😀".encode() + b'"]}'
    canned.answer = (200, body)
    tracemalloc.start()
    with pytest.raises(ProtocolError) as caught:
        scorers[0].score_details("q", ["d0", "d1"])
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert caught.value.status == 200
    assert kept < 2 * len(body)  # as a text it takes four times that


def test_a_long_error_is_shown_by_its_beginning_and_not_read(monkeypatch):
    monkeypatch.setattr(answers, "from_json", lambda *_, **__: pytest.fail("values were built"))
    answer = HttpAnswer("http://a", 422, {}, b'{"detail":"no","input":"' + b"x" * 300_000 + b'"}')

    assert str(answers.refusal(answer)).startswith('http://a refused the request with 422: {"detail":"no"')


def test_an_answer_in_very_many_pieces_is_refused():
    """Each piece of a chunked body costs far more than the few bytes in it."""

    def drip(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 10_100)

    with (
        raw_server(drip) as url,
        llamacpp(url) as scorer,
        pytest.raises(ProtocolError, match="more than 10000 pieces"),
    ):
        scorer.score("q", ["d"])


async def test_a_bomb_is_unpacked_in_steps_that_let_others_in(monkeypatch):
    """A piece that would expand to megabytes does not hold the loop while it does."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    class Response:
        async def aiter_raw(self):
            yield gzip.compress(b"[" + b" " * (16 << 20) + b"]")

    counting = asyncio.create_task(count())
    head = HttpAnswer("http://a", 200, {"content-encoding": "gzip"}, b"")
    size = 0
    async for piece in transport._decompressed(Response(), head, 32 << 20):
        size += len(piece)
    counting.cancel()

    assert size == (16 << 20) + 2
    assert turns >= 16


def test_of_a_list_of_models_only_the_first_names_are_kept():
    cards = [{"id": f"{number}" + "m" * 4_000, "owned_by": "llamacpp"} for number in range(200)]
    handle = lambda request: {"data": cards} if request.method == "GET" else GOOD  # noqa: E731
    with serving(handle) as server, HttpScorer(server.url) as scorer:
        models = scorer.open().models

    assert len(models) == 50
    assert max(map(len, models)) <= 256
