"""`qwen-rerank eval` from a folder of files to a page, as a user calls it."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen_rerank.calibration import Calibration
from qwen_rerank.cli import app, options, show
from qwen_rerank.cli.show import number_table, print_table
from qwen_rerank.testing import OverlapScorer

WORDS = ["red", "green", "blue", "black", "white", "pink", "grey", "brown"]
HOSTILE = "<script>alert(1)</script><img src=http://evil/x>"


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: OverlapScorer())
    monkeypatch.setattr(show, "console", Console(width=200))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def beir(tmp_path):
    """Eight queries with a relevant document each, and one that merely holds the word; every text and name is hostile."""
    folder = tmp_path / HOSTILE.replace("/", "|")
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "text": f"{word} paint for walls {HOSTILE}"} for i, word in enumerate(WORDS)]
    documents += [{"_id": f"n{i}", "text": f"{word} {word}"} for i, word in enumerate(WORDS)]
    queries = [{"_id": f"q{i}", "text": f"{word} paint {HOSTILE}"} for i, word in enumerate(WORDS)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(WORDS)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def call(*arguments):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_a_collection_to_a_page(beir, tmp_path):
    call("run", beir, "--depth", "8", "--export")
    swept = call("sweep", beir, "--depth", "4", "--depth", "8", "--timed", "2", "--price-per-hour", "1")
    call("calibrate", beir, "--depth", "8", "--recall", "0.9", "--save", "fitted.json")
    call("report", "runs", "--html", "page.html")

    assert "Within any budget, take" in swept
    assert Calibration.load("fitted.json") is not None
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(heading in page for heading in ("Both stages", "Which setting?", "What a score is worth"))


def test_the_page_loads_nothing_and_runs_nothing_that_the_texts_hold(beir, tmp_path):
    call("run", beir, "--depth", "8")
    call("report", "runs", "--html", "page.html")

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert not re.search(r"<script|<img|<link|<[^>]*\ssrc=|url\(http|@import", page)


def test_the_runs_that_were_written_compare_as_they_were_measured(beir, tmp_path):
    call("run", beir, "--depth", "8")
    result = json.loads(next((tmp_path / "runs").glob("*.run.json")).read_text(encoding="utf-8"))
    first, second = sorted((tmp_path / "runs").glob("*.run"), key=lambda path: "then" in path.name)

    compared = call("compare", beir / "qrels" / "test.tsv", first, second)

    for system in result["systems"]:
        assert f"{system['means']['nDCG@10']:.4f}" in compared
    assert f"{result['systems'][1]['comparison']['difference']:+.4f}" in compared


def test_queries_that_a_run_leaves_out_are_said(beir, tmp_path):
    call("run", beir, "--depth", "8", "--queries", "6")
    first, second = sorted((tmp_path / "runs").glob("*.run"), key=lambda path: "then" in path.name)

    assert "leaves 2 of 8 judged queries unanswered" in call("compare", beir / "qrels" / "test.tsv", first, second)


def test_a_budget_that_nothing_keeps_leaves_what_was_measured(beir, tmp_path):
    result = CliRunner().invoke(
        app, ["eval", "sweep", str(beir), "--depth", "4", "--timed", "2", "--max-ms", "0.00001"]
    )

    assert result.exit_code != 0
    assert len(list((tmp_path / "runs").glob("*.sweep.json"))) == 1


def test_a_narrow_terminal_cuts_no_number_and_no_name():
    narrow = io.StringIO()

    print_table(
        Console(file=narrow, width=30), number_table(["system", "a", "b"], [["bm25+pocket", "1234567890123456", "0.5"]])
    )

    assert all(text in narrow.getvalue() for text in ("bm25+pocket", "1234567890123456", "0.5"))
