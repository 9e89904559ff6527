"""`index`, `status` and `search` over a folder, as somebody types them."""

from __future__ import annotations

import json

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
    monkeypatch.setattr(show, "console", Console(width=120))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with notes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "笔记").mkdir()
    (tmp_path / "笔记" / "lease.md").write_text("# Lease\n\nIntro.\n\n# End\n\nThe lease ends in June.\n")
    (tmp_path / "笔记" / "狗.txt").write_text("狗在六点吃饭。", encoding="utf-8")
    (tmp_path / "笔记" / "cat.png").write_bytes(b"\x89PNG\0")
    return tmp_path


def run(*arguments):
    done = runner.invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.exception or done.output
    return done


@pytest.fixture
def indexed(home):
    return run("index", home / "笔记", "--store", "~/kb")


def test_every_file_is_named_whether_it_went_in_or_not(indexed, home):
    assert (home / "kb" / "commit.json").is_file()
    lines = indexed.output.splitlines()
    assert lines[:3] == [
        "  added      笔记/lease.md  2 passages",
        "  added      笔记/狗.txt  1 passages",
        "  skipped no kind that can be read (.png): 笔记/cat.png",
    ]
    assert "2 added; 3 passages embedded, 0 kept their vector, 0 removed; 1 skipped" in lines[3]


@pytest.mark.parametrize(("embedder", "ending"), [("mini", " --model mini"), ("hash", "")])
def test_the_next_command_names_the_reranker_of_a_shipped_pair(home, monkeypatch, embedder, ending):
    model = HashEmbedder(256)
    model.name = embedder
    monkeypatch.setattr("qwen_rerank.embedders.load_embedder", lambda name: model)

    last = run("index", home / "笔记", "--store", home / "kb").output.splitlines()[-1]

    assert last == f'  qwen-rerank search {home / "kb"} "your question"{ending}'


def test_an_empty_folder_becomes_a_store(home):
    (home / "volume").mkdir()

    assert "now holds 3 passages" in run("index", home / "笔记", "--store", home / "volume").output


def test_a_dry_run_makes_no_store(home):
    done = run("index", home / "笔记", "--store", home / "kb", "--dry-run")

    assert "Nothing was written; a run would give: 2 added; 3 passages embedded" in done.output
    assert not (home / "kb").exists()


def test_a_folder_can_be_removed_and_status_lists_what_is_there(indexed, home):
    assert "笔记: 2 files, 3 passages of up to 300 tokens" in run("status", "~/kb").output
    assert "3 passages removed" in run("index", "--store", "~/kb", "--remove", "笔记").output
    assert json.loads(run("status", "~/kb", "--json").stdout)["folders"] == []
    assert "no folder was named" in str(runner.invoke(app, ["index", "--store", "~/kb"]).exception)


def test_rows_that_are_left_out_take_one_line_a_file(home):
    rows = "\n".join('{"text": ""}' for _ in range(30))
    (home / "笔记" / "rows.jsonl").write_text('{"text": "a"}\n' + rows)

    output = run("index", home / "笔记", "--store", "~/kb").output
    assert "skipped 30 rows of 笔记/rows.jsonl; the first is 2: the row has no text" in output


def test_an_answer_has_its_line_its_heading_and_both_ranks(indexed):
    output = run("search", "~/kb", "when does the lease end", "--top-k", 3, "--top-n", 1).output

    assert "score 0." in output
    assert "round 1: 1" in output
    assert "笔记/lease.md:5" in output
    assert output.index("End") < output.index("The lease ends in June.")


def test_programs_get_json_files_or_markdown(indexed):
    search = ["search", "~/kb", "when does the lease end", "--top-n", 2]
    first = json.loads(run(*search, "--json").stdout.splitlines()[0])

    assert (first["place"], first["first_stage_rank"], first["metadata"]["heading"]) == ("笔记/lease.md:5", 1, "End")
    assert "best_window" in first
    assert run(*search, "--files").stdout == "笔记/lease.md\n"
    assert "## 1. 笔记/lease.md:5 — End\n\nscore 0." in run(*search, "--md").stdout
    assert "> The lease ends in June." in run(*search, "--md").stdout


def test_context_and_filters(indexed):
    one = json.loads(run("search", "~/kb", "lease end", "--top-n", 1, "-C", 1, "--json").stdout)
    assert one["above"] == ["# Lease\n\nIntro."]

    assert run("search", "~/kb", "lease end", "--suffix", ".txt", "--files").stdout == "笔记/狗.txt\n"
    assert run("search", "~/kb", "狗", "--path", "笔记/*", "--until", "2000-01-01").stderr.startswith("Nothing found")


def test_control_characters_of_a_file_do_not_reach_the_terminal(home):
    (home / "笔记" / "evil.txt").write_text("lease \x1b]0;owned\x07 [bold]no markup[/bold]")
    run("index", home / "笔记", "--store", "~/kb")

    for form in ([], ["--md"]):
        output = run("search", "~/kb", "owned markup", *form).stdout
        assert "\x1b" not in output
        assert "[bold]no markup[/bold]" in output


def test_a_folder_without_any_text_is_an_error_and_leaves_nothing(home):
    (home / "pictures").mkdir()
    (home / "pictures" / "a.png").write_bytes(b"\x89PNG\0")

    done = runner.invoke(app, ["index", str(home / "pictures"), "--store", str(home / "s")])
    assert isinstance(done.exception, InvalidInputError)
    assert "no document found" in str(done.exception)
    assert not (home / "s").exists()
