"""The commands, from files to both rounds on the screen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen_rerank.cli import app, options, show
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.testing import HashEmbedder, OverlapScorer

runner = CliRunner()


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: OverlapScorer())
    monkeypatch.setattr("qwen_rerank.embedders.load_embedder", lambda name: HashEmbedder(256))
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
    assert "2 documents, 1 skipped" in indexed.output
    assert "skipped broken.txt: UnicodeDecodeError" in indexed.output
    assert found.output.index("适合程序员") < found.output.index("薄膜")
    assert "was" in found.output


def test_indexing_again_replaces_what_is_there(texts, tmp_path):
    for _ in range(2):
        result = runner.invoke(app, ["index", str(texts), "--store", str(tmp_path / "store")])

    assert "now holds 2" in result.output


def test_json_lines_hold_rank_score_and_text(texts):
    result = runner.invoke(app, ["rerank", "程序员", str(texts / "b.txt"), str(texts / "a.txt"), "--json"])

    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["rank"], row["id"], row["index"]) for row in rows] == [(1, "a.txt", 1), (2, "b.txt", 0)]
    assert all(0 <= row["score"] <= 1 and row["error"] is None for row in rows)


def test_rerank_reads_a_document_a_line_from_stdin():
    result = runner.invoke(app, ["rerank", "red", "-", "--json"], input="blue\n\nred\n")

    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["red", "blue"]


def test_control_characters_of_a_document_do_not_reach_the_terminal(tmp_path):
    (tmp_path / "evil.txt").write_text("red \x1b]0;owned\x07 [bold]not markup[/bold]", encoding="utf-8")

    result = runner.invoke(app, ["rerank", "red", str(tmp_path / "evil.txt")])

    assert "\x1b]0;" not in result.output
    assert "[bold]not markup[/bold]" in result.output


def test_a_folder_without_documents_is_an_error_and_makes_no_store(tmp_path):
    (tmp_path / "empty").mkdir()

    result = runner.invoke(app, ["index", str(tmp_path / "empty"), "--store", str(tmp_path / "store")])

    assert isinstance(result.exception, InvalidInputError)
    assert not (tmp_path / "store").exists()


def test_the_demo_shows_every_query_in_both_languages():
    result = runner.invoke(app, ["demo"])

    assert result.exit_code == 0, result.output
    assert "适合程序员的机械键盘" in result.output
    assert "Which planet is known as the Red Planet?" in result.output
    assert "It is not Qwen3-Reranker" in " ".join(result.output.split())


def test_an_error_of_ours_is_one_sentence_and_exit_status_1():
    done = subprocess.run(
        [sys.executable, "-m", "qwen_rerank", "rerank", "q", "no-such-file"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "qwen-rerank: 'no-such-file' does not exist; give a folder or a .txt, .md, .jsonl, .csv file.\n"
    )


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom qwen_rerank.cli import app\nfrom typer.testing import CliRunner\n"
        "assert_ok = CliRunner().invoke(app, ['--help']).exit_code\n"
        "heavy = {'torch', 'faiss', 'transformers', 'numpy', 'fastapi', 'httpx2', 'matplotlib'} & set(sys.modules)\n"
        "print(assert_ok, sorted(heavy))"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "0 []\n"
