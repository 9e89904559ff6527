"""Requests that nobody planned: each gets a status below 500 and a body in shape, and the server lives on."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from qwen_rerank.serve.app import create_app
from qwen_rerank.serve.settings import ServeSettings
from tests.serve import grammar
from tests.serve.conftest import live_server
from tests.serve.raw import request, talk
from tests.serve.stubs import Oracle

ERROR_KEYS = {"detail", "message", "error", "request_id"}
MAX_ANSWER_S = 2.0


def test_requests_of_our_own_grammar(full):
    """On a real socket: no dropped connection without a status, no 5xx, every error in one shape, nothing slow."""
    chance = random.Random(20_000)
    statuses: Counter[int] = Counter()
    slowest_s = 0.0
    with live_server(any_model=True, head_timeout_s=0.2, receive_timeout_s=0.1, keep_alive_s=1) as server:
        for number in range(18_000 if full else 900):
            body, headers = grammar.body(chance), grammar.headers(chance)
            path = chance.choice(grammar.PATHS)
            start = time.perf_counter()
            answer = talk(server.port, request(body, path=path, **headers))
            slowest_s = max(slowest_s, time.perf_counter() - start)
            statuses[answer.status] += 1
            place = f"request {number}: {path} {headers} {body[:300]!r}"
            assert 200 <= answer.status < 500, place
            content = answer.json()
            if answer.status != 200:
                assert set(content) - {"error_type"} == ERROR_KEYS, place
                assert len(answer.body) < 2_000, place
    print(
        f"\nown grammar: {sum(statuses.values())} requests, statuses {dict(sorted(statuses.items()))}, "
        f"slowest {slowest_s:.2f} s"
    )

    assert not full or slowest_s <= MAX_ANSWER_S
    assert statuses[200] > 50
    assert statuses[422] > 50
    assert statuses[400] > 50


@pytest.fixture(scope="module")
def operations():
    """Return every described operation of an app that is ready."""
    app = create_app(Oracle(), settings=ServeSettings(any_model=True))
    return [operation.ok() for operation in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]


def test_requests_of_schemathesis(operations, full):
    """Each answer's status, type and body are as described; what breaks the description is refused."""
    n_wanted = 2_000 if full else 100
    n_operations = sum(operation.method == "post" for operation in operations)  # a GET has one request only
    statuses: Counter[int] = Counter()
    seconds: list[float] = []
    for operation in operations:

        @settings(
            max_examples=n_wanted // n_operations + 1,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case) -> None:
            # A description cannot say that 3.0 is refused where 3 is wanted, nor how many tokens a query has.
            response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
            statuses[response.status_code] += 1
            seconds.append(response.elapsed)

        given(case=operation.as_strategy())(check)()
    print(
        f"\nschemathesis: {sum(statuses.values())} requests, statuses {dict(sorted(statuses.items()))}, "
        f"slowest {max(seconds):.2f} s"
    )

    assert sum(statuses.values()) >= n_wanted
    assert max(statuses) < 500
    assert not full or max(seconds) <= MAX_ANSWER_S


def test_the_description_is_a_valid_document(operations):
    assert len(operations) > 15
    assert json.dumps(create_app(Oracle()).openapi())
