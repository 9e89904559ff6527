"""`index`, `status` and `search` over a folder, as somebody types them."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen_rerank import folders
from qwen_rerank.cli import app, options, show
from qwen_rerank.cli import folders as cli_folders
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.testing import HashEmbedder, OverlapScorer

runner = CliRunner()


def named_embedder(name):
    made = HashEmbedder(256)
    made.name = name
    return made


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(options, "load_scorer", lambda model, **kwargs: OverlapScorer())
    monkeypatch.setattr("qwen_rerank.embedders.load_embedder", named_embedder)
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
        "  added      笔记/狗.txt  1 passage",
        "  skipped no kind that can be read (.png): 笔记/cat.png",
    ]
    assert "2 added; 3 passages embedded, 0 kept their vector, 0 removed; 1 skipped" in lines[3]


@pytest.mark.parametrize(("embedder", "ending"), [("mini", " --model mini"), ("hash", "")])
def test_the_next_command_names_the_reranker_of_a_shipped_pair(home, monkeypatch, embedder, ending):
    monkeypatch.setattr("qwen_rerank.embedders.load_embedder", lambda name: named_embedder(embedder))

    last = run("index", home / "笔记", "--store", home / "kb").output.splitlines()[-1]

    assert last == f'  qwen-rerank search {home / "kb"} "your question"{ending}'


def test_an_empty_folder_becomes_a_store(home):
    (home / "volume").mkdir()

    assert "now holds 3 passages" in run("index", home / "笔记", "--store", home / "volume").output


def test_a_store_in_its_own_folder_is_not_read(home, monkeypatch):
    monkeypatch.chdir(home / "笔记")
    for expected in ("2 added", "2 unchanged; 0 passages embedded"):
        done = run("index", ".", "--store", "kb")
        assert expected in done.output
    assert "skipped a store: 笔记/kb/" in done.output


def watching(monkeypatch, *steps):
    """Let each look at the files be preceded by one step; Ctrl-C ends the last."""
    left = list(steps)

    def sleep(seconds):
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr("qwen_rerank.cli.folders.time", SimpleNamespace(sleep=sleep))


def test_watching_follows_every_change_and_outlasts_a_folder_that_is_away(home, monkeypatch):
    notes, away = home / "笔记", home / "away"
    watching(
        monkeypatch,
        lambda: (notes / "狗.txt").write_text("狗在七点吃饭。", encoding="utf-8"),
        lambda: (notes / "new.txt").write_text("new"),
        lambda: None,
        lambda: (notes / "lease.md").unlink(),
        lambda: notes.rename(away),
        lambda: away.rename(notes),
    )
    lines = run("index", notes, "--store", "~/kb", "--watch").output.splitlines()

    assert [line.split(";")[0] for line in lines if " embedded, " in line] == [
        "2 added",
        "1 changed, 1 unchanged",
        "1 added, 2 unchanged",
        "2 unchanged, 1 deleted",
        "2 unchanged",
    ]
    assert any("does not exist" in line for line in lines)
    assert "now holds 2 passages" in lines[-2]


def test_watching_sees_what_changed_during_the_first_run_and_keeps_what_came_into_an_empty_store(home, monkeypatch):
    (home / "empty").mkdir()
    sync = folders.sync_folder

    def slow(*arguments, **settings):
        report = sync(*arguments, **settings)
        (home / "empty" / "late.txt").write_text("late")
        return report

    monkeypatch.setattr("qwen_rerank.folders.sync_folder", slow)
    watching(monkeypatch, lambda: None)

    assert "now holds 1 passage." in run("index", home / "empty", "--store", "~/kb", "--watch").output


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


def test_a_search_takes_the_filters_of_the_store(indexed):
    second = json.dumps({"part": {"$gte": 2}, "suffix": {"$in": [".md", ".rst"]}})
    [found] = run("search", "~/kb", "lease", "--filter", second, "--json").stdout.splitlines()
    assert json.loads(found)["metadata"]["part"] == 2
    assert run("search", "~/kb", "lease", "--suffix", ".txt", "--filter", second).stderr.startswith("Nothing found")


@pytest.mark.parametrize(
    ("store", "filter", "says"),
    [("~/kb", "{year: 2020}", "must be JSON"), ("http://127.0.0.1:9", "{}", "for a store on this machine")],
)
def test_a_filter_that_cannot_be_used_is_said(indexed, store, filter, says):
    error = runner.invoke(app, ["search", store, "lease", "--filter", filter]).exception
    assert isinstance(error, InvalidInputError)
    assert says in str(error)


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


def test_a_misspelt_folder_leaves_no_empty_store(home):
    done = runner.invoke(app, ["index", str(home / "nots"), "--store", str(home / "s")])

    assert "does not exist" in str(done.exception)
    assert not (home / "s").exists()


@pytest.fixture
def table(home):
    path = home / "商品.csv"
    path.write_bytes('编号,名称,说明\n1,键盘,机械的，适合程序员\n2,鼠标,"无线的\n3,耳机,降噪\n'.encode("gb18030"))
    return path


@pytest.mark.parametrize(("column", "text"), [(None, "编号: 3\n名称: 耳机\n说明: 降噪"), ("说明", "降噪")])
@pytest.mark.parametrize("command", ["rerank", "store add", "index"])
def test_every_command_reads_a_table_in_the_same_way(table, home, command, column, text):
    """Chinese columns in GB18030, a stray quote in one row: that row is named, and the others are read."""
    more = ["--text-column", column] if column else []
    if command == "rerank":
        done = run("rerank", "降噪", table, *more, "--json")
        texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    else:
        fill = ("index", table, "--store", "~/kb") if command == "index" else ("store", "add", "~/kb", table)
        if command == "store add":
            run("store", "create", "~/kb")
        done = run(*fill, *more)
        texts = [json.loads(line)["text"] for line in run("search", "~/kb", "降噪", "--json").stdout.splitlines()]
    assert (texts[0], len(texts)) == (text, 2)
    assert "skipped 1 row of " in done.output
    assert "商品.csv; the first is 3: no CSV record" in done.output


def test_a_column_that_is_not_there_is_named_with_those_that_are(table):
    done = runner.invoke(app, ["rerank", "q", str(table), "--text-column", "正文"])

    assert "the columns are '编号', '名称', '说明': name one with --text-column" in done.output + str(done.exception)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
@pytest.mark.parametrize("inner", [b"", b"/sub", b"/note.txt"])
def test_a_path_that_is_no_unicode_is_to_be_renamed_and_leaves_no_store_behind(tmp_path, inner):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd7\xca"))
    (folder / "sub").mkdir(parents=True)
    (folder / "note.txt").write_text("a note")

    done = runner.invoke(app, ["index", os.fsdecode(os.fsencode(folder) + inner), "--store", str(tmp_path / "kb")])

    assert str(done.exception).endswith("/\\xd7\\xca cannot be indexed: its name is no Unicode; rename it.")
    assert not (tmp_path / "kb").exists()


@pytest.fixture
def terminal(monkeypatch):
    """What a person at a terminal sees beside the answers."""
    shown = io.StringIO()
    monkeypatch.setattr(show, "errors", Console(file=shown, force_terminal=True, width=120))
    return shown


def test_a_person_sees_what_is_going_on_and_how_far_it_is(home, terminal):
    run("index", home / "笔记", "--store", home / "kb")
    assert "3 passages · files" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()

    run("search", home / "kb", "lease", "--top-k", "2")
    assert "searching 3 passages, reranking up to 2 …" in terminal.getvalue()

    run("rerank", "lease", home / "笔记")
    assert "loading" in terminal.getvalue()
    assert "reranking 2 documents …" in terminal.getvalue()


def test_a_program_sees_no_progress(home, capfd):
    run("index", home / "笔记", "--store", home / "kb")
    run("rerank", "lease", home / "笔记")

    assert "…" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [("search", "kb", "q", "--top-n", "0"), ("search", "kb", "q", "-C", "-1"), ("search", "kb", "q", "-C", "9999999")],
)
def test_a_count_beyond_reason_is_refused_at_once(home, wrong):
    done = runner.invoke(app, [*wrong])

    assert done.exit_code == 2
    assert "Invalid value" in done.output


def test_a_look_at_a_folder_outlasts_what_goes_meanwhile(home, monkeypatch):
    """A folder may vanish, or be closed to us, between its name and its content."""
    (home / "笔记" / "gone").mkdir()
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "gone":
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)

    seen = cli_folders._state([home / "笔记"], home / "kb")
    assert {Path(one).name for one in seen} >= {"lease.md", "狗.txt"}


def test_ids_that_begin_alike_can_be_told_apart(home):
    folder = home / "a folder of many" / "contracts of one kind"
    folder.mkdir(parents=True)
    for name in ("lease of June.txt", "lease of July.txt", "七月的租约合同副本.txt"):
        (folder / name).write_text("lease", encoding="utf-8")

    shown = run("rerank", "lease", home / "a folder of many").output

    assert all(end in shown for end in ("lease of June.txt", "lease of July.txt", "…的租约合同副本.txt"))
