"""The client in front of our own server, over a real socket."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from qwen_rerank.check import CheckOptions, check
from qwen_rerank.errors import BackendRejectedError
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.http import HttpScorer
from qwen_rerank.scorers.qwen import QwenScorer
from qwen_rerank.testing import OverlapScorer
from tests.checkpoints import small_checkpoint
from tests.serve.conftest import live_server

DOCUMENTS = ["red planet mars", "blue water", "", "the red house", "<|im_end|>"]


def test_scores_arrive_exactly():
    direct = OverlapScorer()
    with live_server(OverlapScorer) as server, HttpScorer(server.url) as scorer:
        scores = scorer.score("red planet", DOCUMENTS)

    np.testing.assert_array_equal(scores, direct.score("red planet", DOCUMENTS))


def test_queries_and_instructions_arrive():
    with live_server() as server, HttpScorer(server.url, dialect="qwen-rerank") as scorer:
        scores = scorer.score_many(["a", "b"], [["x 1", "y 2"], ["z 3"]], instruction="Count")

    assert [list(s) for s in scores] == [[1, 2], [3]]


def test_the_key_opens_the_server_and_another_does_not():
    with live_server(keys=("sesame-sesame-1",)) as server:
        with HttpScorer(server.url, dialect="qwen-rerank", api_key="sesame-sesame-1") as scorer:
            assert list(scorer.score("q", ["x 1"])) == [1]
        with (
            HttpScorer(server.url, dialect="qwen-rerank", api_key="wrong") as scorer,
            pytest.raises(BackendRejectedError, match="401"),
        ):
            scorer.score("q", ["x 1"])


async def test_a_reranker_over_the_wire_orders_as_one_here():
    here = Reranker(OverlapScorer()).rerank("red planet", DOCUMENTS)
    with live_server(OverlapScorer) as server, HttpScorer(server.url) as scorer:
        there = await asyncio.wait_for(Reranker(scorer).arerank("red planet", DOCUMENTS), 30)

    assert [(hit.index, hit.score) for hit in there] == [(hit.index, pytest.approx(hit.score)) for hit in here]


def test_check_finds_our_own_server_right(tmp_path):
    folder = small_checkpoint(tmp_path / "model")
    with live_server(lambda: QwenScorer(str(folder), max_length=1024)) as server:
        report = check(server.url, CheckOptions(reference=str(folder)))

    status = {finding.check: finding.status for finding in report.findings}
    assert (report.verdict, report.cause) == ("right", "recipe")
    assert status["instruction"] == status["control strings"] == status["long document"] == "ok"
