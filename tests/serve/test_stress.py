"""The measurements of `eval/serving`, small here and with their full bars by `--full`: the server against its clients."""

from __future__ import annotations

import random

import pytest

from eval.serving import crowd, overload, sigterm
from eval.serving.load import Reply, question

pytestmark = pytest.mark.heavy


def test_a_crowd_of_clients_each_gets_its_own_answer(full):
    found = crowd.measure(n_clients=500 if full else 100, n_rounds=10 if full else 3)

    assert found["own_answer"] == found["requests"] == found["clients"] * (10 if full else 3)
    assert found["met"]
    assert found["server_mib_peak"] - found["server_mib_before"] < 100


def test_overload_costs_no_goodput_and_is_refused_early(full, monkeypatch):
    """The small run says only that what is let in is answered and the rest refused; by `--full` also how soon, and the goodput."""
    if not full:
        monkeypatch.setattr(overload, "N_REFUSALS", 10)
    factors = (1.0, 2.0, overload.OVERLOAD) if full else (overload.OVERLOAD,)
    found = overload.measure(service_s=0.02, factors=factors, seconds=20.0 if full else 1.0)
    last = found["loads"][-1]

    assert all(load["wrong"] == load["unanswered"] == load["without_retry_after"] == 0 for load in found["loads"])
    assert last["rejected"] > 0 < last["answered"]
    assert not full or found["met"]


def test_a_shutdown_under_load_loses_no_request_that_was_taken(full):
    found = sigterm.measure(n_shutdowns=50 if full else 2)

    assert found["lost"] == found["wrong"] == 0
    assert found["answered_after_the_signal"] >= found["shutdowns"]
    assert found["met"]


@pytest.mark.parametrize(
    ("status", "request_id", "body", "right"),
    [
        pytest.param(200, "mine", b'{"results": [{"index": 0, "relevance_score": %s}]}', True, id="own"),
        pytest.param(200, "other", b'{"results": [{"index": 0, "relevance_score": %s}]}', False, id="of another"),
        pytest.param(200, "mine", b'{"results": [{"index": 0, "relevance_score": 0.1%s}]}', False, id="another score"),
        pytest.param(200, "mine", b'{"results": []}', False, id="nothing"),
        pytest.param(429, "mine", b"", False, id="refused"),
    ],
)
def test_an_answer_that_is_not_ones_own_is_seen(status, request_id, body, right):
    asked = question("mine", random.Random(1), n_documents=1)
    filled = body.replace(b"0.1%s", b"0.123456").replace(b"%s", str(asked.values[0]).encode())

    assert asked.is_answered_by(Reply(status, 0.0, 1.0, request_id, body=filled)) is right
