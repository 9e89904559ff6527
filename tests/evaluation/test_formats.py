"""What a number format costs, measured beside the exact one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from qwen_rerank.cli import app
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation import formats
from qwen_rerank.evaluation.formats import (
    Format,
    FormatRun,
    format_cost,
    sample_collection,
    score_in_format,
    top_overlap,
)
from qwen_rerank.scorers.qwen.quantization import int8_works


@pytest.fixture
def scores(monkeypatch):
    """Have each format give known scores: by place in float32, and as `other` makes of them in the other."""

    def give(other):
        def scored(model, chosen, queries, documents):
            exact = [np.arange(len(texts), 0, -1, dtype=np.float32) for texts in documents]
            if chosen.dtype == "float32":
                return FormatRun("float32", exact, 2.0, 4 << 30)
            return FormatRun("bfloat16", [other(each) for each in exact], 1.0, 2 << 30)

        monkeypatch.setattr(formats, "_in_own_process", scored)

    return give


def test_a_format_with_equal_order_costs_no_quality(scores, collection):
    scores(lambda exact: exact + np.float32(0.25))
    cost = format_cost("m", Format(dtype="bfloat16"), collection, depth=5)

    assert (cost.largest, cost.typical, cost.top_overlap) == (0.25, 0.25, 1.0)
    assert cost.tau is None  # one document has no order
    assert (cost.change.difference, cost.change.low, cost.change.high) == (0, 0, 0)
    assert (cost.n_queries, cost.n_documents) == (8, 8)  # BM25 finds one for each word
    assert cost.documents_per_s == (4.0, 8.0)


def test_a_reversed_order_is_seen(scores):
    collection = sample_collection().head(3)
    scores(lambda exact: -exact)
    cost = format_cost("m", Format(dtype="bfloat16"), collection, depth=20)

    assert cost.tau == -1
    assert cost.top_overlap < 0.1  # one query has nineteen documents, whose tenth stays
    assert cost.largest == 40
    assert cost.ndcg[0] > cost.ndcg[1]


@pytest.mark.parametrize(("other", "share"), [([3, 2, 1, 0], 1.0), ([0, 3, 2, 1], 0.5), ([0, 1, 2, 3], 0.0)])
def test_the_share_of_the_first_ones_that_both_have(other, share):
    assert top_overlap(np.array([3, 2, 1, 0]), np.array(other), n=2) == share


def test_the_exact_format_itself_is_refused(collection):
    with pytest.raises(InvalidInputError, match="is the exact one itself, float32"):
        format_cost("pocket", Format(), collection)


def test_scores_in_a_format_are_the_scorers():
    found = score_in_format("pocket", Format(dtype="bfloat16"), ["apple", "pear"], [["an apple", "a pear"], ["a pear"]])

    assert (found.name, [len(each) for each in found.log_odds]) == ("bfloat16", [2, 1])
    assert found.log_odds[0][0] > found.log_odds[0][1]


@pytest.mark.heavy
@pytest.mark.skipif(not int8_works(), reason="this build or CPU has no exact 8-bit products")
def test_the_command_says_what_int8_costs(tmp_path):
    """The shipped model on shipped questions, in processes of their own."""
    result = CliRunner().invoke(
        app,
        ["check", "pocket", "--quantize", "int8", "--queries", "4", "--depth", "8", "--json"],
        catch_exceptions=False,
    )
    report = json.loads(result.stdout)

    assert result.exit_code == 0
    assert 0 < report["typical"] <= report["largest"] < 0.5
    assert report["tau"] > 0.8
    assert all(size > 0 for size in report["peak_bytes"])
    assert report["names"][0] == "float32"
    assert "int8 over" in report["names"][1]


def test_the_command_prints_a_table(scores):
    scores(lambda exact: exact + np.float32(0.25))
    result = CliRunner().invoke(app, ["check", "pocket", "--dtype", "bfloat16", "--queries", "2", "--depth", "5"])

    assert result.exit_code == 0
    for line in ("documents/s", "4.00 GiB", "largest difference", "0.250", "Kendall's tau"):
        assert line in result.stdout


def test_a_server_has_no_format_to_choose():
    result = CliRunner().invoke(app, ["check", "http://127.0.0.1:9", "--quantize", "int8"])

    assert isinstance(result.exception, InvalidInputError)
