"""The commands, from files to both rounds on the screen."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen_rerank import Calibration, Reranker, __version__
from qwen_rerank.cli import app, main, options, show
from qwen_rerank.cli.demo import DEMO_EMBEDDER, DEMO_MODEL, as_typed
from qwen_rerank.errors import InvalidInputError, ScorerError
from qwen_rerank.pipeline import TwoRounds
from qwen_rerank.samples import LANGUAGES, load_demo_results
from qwen_rerank.testing import OverlapScorer, TableScorer
from qwen_rerank.types import Candidate, Document, RankedDocument
from tests.cli.test_folders import named_embedder

runner = CliRunner()
LOAD = options.load_scorer


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: OverlapScorer())
    monkeypatch.setattr("qwen_rerank.embedders.load_embedder", named_embedder)
    monkeypatch.setattr(show, "console", Console(width=120))  # else the terminal's, which cuts what a test looks for


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("机械键盘，适合程序员", encoding="utf-8")
    (folder / "b.txt").write_text("薄膜键盘", encoding="utf-8")
    (folder / "broken.txt").write_bytes(b"\xff\xfe\xff")
    return folder


def test_index_then_search_shows_both_rounds(texts, tmp_path):
    indexed = runner.invoke(app, ["index", str(texts), "--store", str(tmp_path / "store")])
    found = runner.invoke(app, ["search", str(tmp_path / "store"), "程序员的键盘", "--top-k", "2"])

    assert indexed.exit_code == found.exit_code == 0
    assert "2 added; 2 passages embedded, 0 kept their vector, 0 removed; 1 skipped" in indexed.output
    assert "skipped no utf-16" in indexed.output
    assert found.output.index("适合程序员") < found.output.index("薄膜")
    assert "round 1: " in found.output
    assert "a.txt" in found.output


def test_indexing_again_embeds_nothing_again(texts, tmp_path):
    for _ in range(2):
        result = runner.invoke(app, ["index", str(texts), "--store", str(tmp_path / "store")])

    assert "2 unchanged; 0 passages embedded" in result.output
    assert "now holds 2 passages" in result.output


def test_json_lines_hold_rank_score_and_text(texts):
    result = runner.invoke(app, ["rerank", "程序员", str(texts / "b.txt"), str(texts / "a.txt"), "--json"])

    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["rank"], row["id"], row["index"]) for row in rows] == [(1, "a.txt", 1), (2, "b.txt", 0)]
    assert all(0 <= row["score"] <= 1 and row["error"] is None for row in rows)


@pytest.mark.parametrize("wanted", [["--model", "http://x"], ["--server", "http://x"]])
def test_a_server_is_named_as_any_model_is(monkeypatch, wanted):
    asked = []
    monkeypatch.setattr(
        "qwen_rerank.scorers.loading.load_scorer", lambda *name, **given: asked.append((name, given)) or OverlapScorer()
    )
    monkeypatch.setattr(options, "load_scorer", LOAD)

    assert runner.invoke(app, ["rerank", "red", "-", *wanted, "--dialect", "tei"], input="red").exit_code == 0
    [(name, given)] = asked
    assert name == ("http://x",)
    assert {option: value for option, value in given.items() if value is not None} == {
        "dialect": "tei",
        "device": "auto",
    }


def test_a_server_is_asked_for_the_model_that_is_named_beside_it(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "qwen_rerank.scorers.loading.load_scorer", lambda *name, **given: asked.append((name, given)) or OverlapScorer()
    )
    monkeypatch.setattr(options, "load_scorer", LOAD)
    wanted = ["--server", "http://x", "--model", "rerank-v3.5", "--dialect", "cohere"]

    assert runner.invoke(app, ["rerank", "red", "-", *wanted], input="red").exit_code == 0
    assert [(name, given["model"]) for name, given in asked] == [(("http://x",), "rerank-v3.5")]


@pytest.mark.parametrize(("given", "meant"), [("", None), (" ", None), ("Find fruit", "Find fruit")])
def test_an_empty_instruction_is_the_default_one_as_over_http(monkeypatch, given, meant):
    scorer = TableScorer({"red": 1.0})
    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: scorer)

    assert runner.invoke(app, ["rerank", "red", "-", "--instruction", given], input="red").exit_code == 0
    assert scorer.calls == [("red", ["red"], meant)]


def test_rerank_reads_a_document_a_line_from_stdin():
    result = runner.invoke(app, ["rerank", "red", "-", "--json"], input="blue\n\nred\n")

    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["red", "blue"]
    assert "no document came on stdin" in str(runner.invoke(app, ["rerank", "red", "-"], input="\n").exception)


def test_control_characters_of_a_document_do_not_reach_the_terminal(tmp_path):
    (tmp_path / "evil.txt").write_text("red \x1b]0;owned\x07 [bold]not markup[/bold]", encoding="utf-8")

    result = runner.invoke(app, ["rerank", "red", str(tmp_path / "evil.txt")])

    assert "\x1b]0;" not in result.output
    assert "[bold]not markup[/bold]" in result.output


def test_a_folder_without_documents_is_an_error_and_makes_no_store(tmp_path):
    (tmp_path / "empty").mkdir()

    for command in (["index", str(tmp_path / "empty"), "--store", str(tmp_path / "s")], ["rerank", "q", str(tmp_path)]):
        result = runner.invoke(app, command)
        assert isinstance(result.exception, InvalidInputError)
        assert "no document found" in str(result.exception)
    assert not (tmp_path / "s").exists()


def test_a_store_knows_its_embedder(texts, tmp_path, monkeypatch):
    """Only `index` has to be told; another embedder would be refused anyway."""
    asked = []

    def load(name):
        asked.append(name)
        return named_embedder(name)

    monkeypatch.setattr("qwen_rerank.embedders.load_embedder", load)
    store = str(tmp_path / "store")
    commands = (
        ["index", str(texts), "--store", store, "-e", "mine"],
        ["index", str(texts), "--store", store],
        ["search", store, "键盘"],
    )
    assert [runner.invoke(app, command).exit_code for command in commands] == [0, 0, 0]
    assert asked == ["mine"] * 3


def test_a_query_that_finds_nothing_says_so(texts, tmp_path):
    runner.invoke(app, ["index", str(texts), "--store", str(tmp_path / "store")])

    result = runner.invoke(app, ["search", str(tmp_path / "store"), "?!"])

    assert result.exit_code == 0
    assert "Nothing found" in result.stderr


def test_what_the_second_round_moved_out_of_sight_is_shown_too():
    results = [
        RankedDocument(Document(f"d{i}", f"text {i}"), 0.5, 0.0, rank, i) for rank, i in enumerate([2, 0, 1], start=1)
    ]
    candidates = [Candidate(Document(f"d{i}", f"text {i}"), None, i + 1) for i in range(3)]
    console = Console(width=80, record=True, file=io.StringIO())

    console.print(show.two_rounds("q", TwoRounds(candidates, results), n_rows=1))

    rows = [line.split() for line in console.export_text().splitlines() if "text" in line]
    assert rows == [["3", "1", "▲", "2", "0.500", "d2", "text", "2"], ["1", "2", "▼", "1", "0.500", "d0", "text", "0"]]


def test_a_document_without_a_score_says_why():
    failed = RankedDocument(Document("d", "text"), math.nan, math.nan, 1, 0, error=ScorerError("too odd"))
    console = Console(width=80, record=True, file=io.StringIO())

    console.print(show.one_round("q", [failed], n_candidates=1))

    assert console.export_text().splitlines()[-1].split() == ["1", "failed", "d", "too", "odd"]


def test_the_demo_shows_its_cases_with_the_right_passage_and_the_whole_count():
    """Also the question of each language where the second round does not help; every line names the model."""
    result, made = runner.invoke(app, ["demo"]), load_demo_results()
    text = " ".join(result.output.split())

    assert result.exit_code == 0, result.output
    assert all(question in result.output for language in LANGUAGES for question in made["cases"][language])
    assert all(why in text for why in ("does not help: in Chinese the sentence in front", "帮不上忙：中文那题"))
    assert result.output.count("✓") == 1 + sum(len(made["cases"][language]) for language in LANGUAGES)
    for language in LANGUAGES:
        counts = made["counts"][language]
        assert (
            f"in {counts['before']} → {counts['after']} of 60 questions, by the first round → by both, with {DEMO_MODEL}"
            in text
        )


def test_the_demo_names_the_program_as_it_can_be_typed(tmp_path, monkeypatch):
    program = tmp_path / ".venv" / "bin" / "qwen-rerank"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    typed = []
    for path in ("/nowhere", str(program.parent)):
        monkeypatch.setenv("PATH", path)
        typed.append(as_typed())

    assert typed == [".venv/bin/qwen-rerank", "qwen-rerank"]


def test_the_demos_counts_are_those_of_the_model_that_ships():
    """The committed file names the pair that the demo runs, counts every question, and who came first and who no longer does."""
    made = load_demo_results()

    assert (made["model"], made["embedder"]) == (DEMO_MODEL, DEMO_EMBEDDER)
    assert {counts["questions"] for counts in made["counts"].values()} == {60}
    for counts in [*made["counts"].values(), *made["bm25"]["counts"].values()]:
        assert counts["gained"] - counts["lost"] == counts["after"] - counts["before"]


def test_the_demo_takes_a_question_of_ones_own():
    result = runner.invoke(app, ["demo", "--query", "Who was Nikola Tesla?", "--top-n", "1"])

    assert result.exit_code == 0, result.output
    assert result.output.count("Who was Nikola Tesla?") == 2


def test_an_error_of_ours_is_one_sentence_and_exit_status_1():
    done = subprocess.run(
        [sys.executable, "-m", "qwen_rerank", "rerank", "q", "no-such-file"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "qwen-rerank: 'no-such-file' does not exist; give a folder or a file.\n"


def test_an_error_names_the_section_that_helps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qwen_rerank", "search", str(tmp_path / "no-store"), "q"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "What helps: qwen-rerank help store"


def test_the_version_and_short_help_are_where_one_looks_for_them():
    assert runner.invoke(app, ["--version"]).output == f"qwen-rerank {__version__}\n"
    for command in ([], ["search"], ["eval", "run"]):
        assert runner.invoke(app, [*command, "-h"]).output == runner.invoke(app, [*command, "--help"]).output


def test_help_says_what_is_meant(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    assert "new store" not in runner.invoke(app, ["search", "-h"]).output
    assert "[document ids]" in runner.invoke(app, ["eval", "run", "-h"]).output
    assert "--no-no-auth" not in runner.invoke(app, ["serve", "-h"]).output


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom qwen_rerank.cli import app\nfrom typer.testing import CliRunner\n"
        "assert_ok = CliRunner().invoke(app, ['--help']).exit_code\n"
        "heavy = {'torch', 'faiss', 'transformers', 'numpy', 'fastapi', 'httpx2', 'matplotlib'} & set(sys.modules)\n"
        "print(assert_ok, sorted(heavy))"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "0 []\n"


@pytest.fixture
def calibration(tmp_path):
    """Halves log-odds, for the scorer of these tests."""
    fitted = Calibration(kind="platt", fitted_for=Reranker(OverlapScorer()).calibration_key(), a=0.5, b=-1.0)
    fitted.save(tmp_path / "fitted.json")
    return fitted


def test_a_calibration_reaches_search_and_rerank(texts, tmp_path, calibration):
    runner.invoke(app, ["index", str(texts), "--store", str(tmp_path / "store")])
    use = ["--calibration", str(tmp_path / "fitted.json"), "--json"]

    for command in (["search", str(tmp_path / "store"), "程序员"], ["rerank", "程序员", str(texts)]):
        rows = [json.loads(line) for line in runner.invoke(app, [*command, *use]).stdout.splitlines()]
        assert [row["score"] for row in rows] == pytest.approx(
            [float(calibration.probability(np.array([row["log_odds"]]))[0]) for row in rows], abs=1e-5
        )


def test_a_calibration_and_a_threshold_reach_serve(tmp_path, calibration, monkeypatch):
    given = []
    monkeypatch.setattr("qwen_rerank.serve.telemetry.configure", lambda **_: None)
    monkeypatch.setattr("qwen_rerank.serve.process.serve", lambda load, *, settings, **_: given.append(settings))
    options = ["--calibration", str(tmp_path / "fitted.json"), "--threshold", "0.3"]

    assert runner.invoke(app, ["serve", "--model", "pocket", *options]).exit_code == 0
    assert [(settings.calibration, settings.threshold) for settings in given] == [(calibration, 0.3)]


def test_a_shell_can_be_told_the_commands():
    shown = runner.invoke(app, ["--show-completion", "bash"], prog_name="qwen-rerank", env={"SHELL": "/bin/bash"})

    assert "_QWEN_RERANK_COMPLETE" in shown.output


def test_a_threshold_keeps_what_reaches_it_and_says_where_nothing_does(texts, tmp_path):
    runner.invoke(app, ["index", str(texts), "--store", str(tmp_path / "store")])
    search = ["search", str(tmp_path / "store"), "程序员"]
    scores = [json.loads(line)["score"] for line in runner.invoke(app, [*search, "--json"]).stdout.splitlines()]

    kept = runner.invoke(app, [*search, "--json", "--threshold", f"{scores[0]:.6f}"]).stdout.splitlines()
    assert len(kept) <= 1 < len(scores)
    assert (
        "None of 2 candidates reaches the threshold of 1." in runner.invoke(app, [*search, "--threshold", "1"]).output
    )


@pytest.mark.parametrize(
    ("use", "says"),
    [(["--threshold", "2"], "--threshold must be a probability"), (["--calibration", "no.json"], "cannot be read")],
)
def test_a_wrong_threshold_or_calibration_is_refused_before_a_model_is_loaded(monkeypatch, use, says):
    monkeypatch.setattr(options, "load_scorer", None)

    with pytest.raises(InvalidInputError, match=says):
        runner.invoke(app, ["rerank", "red", "-", *use], input="red", catch_exceptions=False)


def test_json_lines_tell_which_window_decided(texts):
    rows = runner.invoke(app, ["rerank", "程序员", str(texts), "--json"]).stdout.splitlines()

    assert all("best_window" in json.loads(row) for row in rows)


ENCODINGS = ("gbk", "cp1252", "ascii", "latin-1")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_console_of_another_encoding_shows_what_it_can(encoding, monkeypatch):
    monkeypatch.setattr(show, "console", Console(width=100))
    for command in (
        ["demo", "--top-n", "1"] if encoding == "gbk" else ["rerank", "--help"],
        ["doctor"],
        ["help", "--zh"],
    ):
        shown = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        for name, stream in shown.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["qwen-rerank", *command])
        with pytest.raises(SystemExit):
            main()
        shown["stdout"].flush()
        assert len(shown["stdout"].buffer.getvalue()) > 200


@pytest.mark.parametrize(
    ("encoding", "shown"), [("gbk", "√ × ★ · → … ? 键"), ("cp1252", "+ × * • > … ? ?"), ("ascii", "+ x * - > ~ ? ?")]
)
def test_marks_stay_apart_on_a_console_that_lacks_them(encoding, shown):
    assert "✓ ✗ ★ • → … \U0001f600 键".encode(encoding, "qwen-rerank").decode(encoding) == shown


def test_json_for_a_console_of_another_encoding_loses_nothing():
    command = ["rerank", "键盘", "-", "--model", "pocket", "--json"]
    done = run_command(command, PYTHONIOENCODING="cp1252", given="机械键盘")

    assert "机械键盘" in json.loads(done.stdout)["text"]


def run_command(command, *, given="", **env):
    """Run a command as a program, away from the hub."""
    code = "import sys; sys.stdin.reconfigure(encoding='utf-8'); from qwen_rerank.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *command],
        input=given.encode(),
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **env},
    )


def test_an_unreachable_hub_is_one_line_that_says_what_helps(tmp_path):
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = run_command(["rerank", "red", "-"], given="red", **hub)

    first, *others = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert all(word in first for word in ("http://127.0.0.1:9", "HF_ENDPOINT", "mirror", "modelscope", "--model mini"))
    assert others == ["What helps: qwen-rerank help hub"], "no block of retries"


def test_serve_needs_no_module_that_windows_lacks():
    code = (
        "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None; from qwen_rerank.serve.process import *; "
    )
    code += "from qwen_rerank.serve import process; print(process._within_file_limit(ServeSettings()).max_connections)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout == "2048\n", done.stderr
