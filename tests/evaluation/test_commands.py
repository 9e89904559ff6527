"""`qwen-rerank eval` from a folder of files to a page, as a user calls it."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen_rerank.calibration import Calibration
from qwen_rerank.cli import app, options, show
from qwen_rerank.cli.show import number_table, print_table
from qwen_rerank.errors import RerankError
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


def read(folder, kind):
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*.{kind}.json"))]


def refused(*arguments):
    """Return the sentence that refuses a command before anything is scored."""
    with pytest.raises(RerankError) as caught:
        CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    return str(caught.value)


def test_results_of_other_settings_or_queries_stand_beside_each_other(beir, tmp_path):
    for more in ([], ["--queries", "4"], ["--depth", "3"], ["--instruction", "Find paint"], ["--depth", "3"]):
        call("run", beir, "-m", "pocket", *more)

    assert len(read(tmp_path / "runs", "run")) == 4, "the last one is the third again"
    assert len({path.name for path in (tmp_path / "runs").glob("*.bm25.run")}) == 4


def test_another_split_and_a_second_calibration_replace_nothing(beir, tmp_path):
    shutil.copy(beir / "qrels" / "test.tsv", beir / "qrels" / "dev.tsv")
    for more in ([], ["--split", "dev"], ["--kind", "isotonic"]):
        call("calibrate", beir, "--depth", "8", *more)

    assert len(read(tmp_path / "runs", "calibration")) == 3
    assert len(list((tmp_path / "runs").glob("*.fitted.json"))) == 3


def test_a_report_keeps_results_of_other_query_counts_apart(beir, tmp_path):
    call("run", beir, "--depth", "8")
    call("sweep", beir, "--depth", "8", "--timed", "2", "--queries", "4")
    call("report", "runs", "--html", "page.html")

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<h2 id=") == 2
    assert all(f"{n} queries of 16 documents" in page for n in (4, 8))


def test_a_first_stage_is_measured_to_its_own_cut_off_however_little_is_reranked(beir, tmp_path):
    call("run", beir, "--depth", "1")
    call("run", beir, "--depth", "16")

    shallow, deep = sorted(read(tmp_path / "runs", "run"), key=lambda result: result["settings"]["depth"])
    assert shallow["systems"][0]["means"] == deep["systems"][0]["means"]
    assert shallow["systems"][1]["means"]["R@100"] == shallow["systems"][0]["means"]["R@100"]


def test_each_reranker_is_also_compared_with_the_first_stage_that_it_reranks(beir, tmp_path):
    shown = call("run", beir, "-f", "bm25", "-f", "pocket", "--depth", "8")

    [result] = read(tmp_path / "runs", "run")
    assert [row["reranks"] for row in result["systems"]] == [None, "bm25", None, "pocket"]
    pocket, reranked = result["systems"][2:]
    assert reranked["gain"]["difference"] == pytest.approx(reranked["means"]["nDCG@10"] - pocket["means"]["nDCG@10"])
    assert "against the first stage that it reranks" in shown


def test_a_run_of_first_stages_alone_loads_no_model(beir, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "load_scorer", None)

    call("run", beir, "--first-stage-only")
    call("report", "runs", "--html", "page.html")

    assert [row["label"] for row in read(tmp_path / "runs", "run")[0]["systems"]] == ["bm25"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--measure", "nDCG@ten"], "is no measure"),
        (["sweep", "--measure", "accuracy"], "is no measure"),
        (["run", "--measure", "nDCG@0"], "is no measure"),
        (["sweep", "--price-per-hour", "nan"], "--price-per-hour must be a number of at least 0"),
        (["sweep", "--price-per-hour", "1", "--max-cost=-1"], "--max-cost must be"),
        (["sweep", "--max-ms", "inf"], "--max-ms must be"),
        (["calibrate", "--save", "."], "is a folder; name a file"),
        (["run", "--queries", "1"], "1 query with judgements cannot be evaluated; this needs at least 2"),
        (["run", "--queries", "0"], "--queries must be an integer of at least 1"),
        (["calibrate", "--queries", "4"], "needs at least 5"),
        (["calibrate", "--precision", "1.5"], "precision must be"),
        (["calibrate", "--precision", "0.9", "--recall", "0.9"], "not both"),
        (["calibrate", "--save", "nowhere/c.json"], "a folder that is not there"),
        (["calibrate", "--depth", "1"], "0 relevant of 8|8 relevant of 8"),
        (["sweep", "--depth", "0"], "--depth must be an integer of at least 1"),
        (["sweep", "--timed", "0"], "--timed must be an integer of at least 1"),
        (["sweep", "--long-documents", "cut"], "--long-documents must be"),
        (["run", "--first-stage-only", "-m", "pocket"], "leave --model and --server out"),
    ],
)
def test_what_would_fail_after_all_the_work_is_said_before_it(beir, monkeypatch, arguments, says):
    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: pytest.fail("a model was loaded"))
    name, *others = arguments

    assert re.search(says, refused(name, beir, *others))


def test_long_documents_can_be_read_to_another_length(beir, monkeypatch):
    lengths = []
    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: lengths.append(kwargs) or OverlapScorer())

    call("run", beir, "--max-length", "1024")
    call("sweep", beir, "--max-length", "1024", "--depth", "4", "--timed", "2")
    call("calibrate", beir, "--max-length", "1024")

    assert [given["max_length"] for given in lengths] == [1024] * 3


def test_a_stopped_run_says_that_the_same_command_goes_on(beir, monkeypatch):
    class Stopped(OverlapScorer):
        def score(self, query, documents, *, instruction=None):
            raise KeyboardInterrupt

    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: Stopped())
    result = CliRunner().invoke(app, ["eval", "run", str(beir)])

    assert result.exit_code != 0
    assert "the same command again goes on from there" in result.output


def test_a_p95_of_few_timed_searches_says_so(beir):
    swept = call("sweep", beir, "--depth", "8", "-m", "pocket", "--timed", "3", "--measure", "RR@10")

    assert "timed" in swept
    assert re.search(r"its p95 is that of \d timed searches, about the slowest", swept)


def test_few_queries_are_said_to_be_few(beir):
    assert "8 queries are too few to tell systems apart" in call("run", beir, "--depth", "8")


def test_the_help_keeps_what_stands_in_brackets():
    assert "[document ids]" in " ".join(call("run", "--help").replace("│", " ").split())


def test_ids_that_no_run_file_can_carry_are_named_before_the_work(beir):
    corpus = beir / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace('"n0"', '"n 0"'), encoding="utf-8")

    assert "'n 0' holds white space" in refused("run", beir, "--depth", "4")
