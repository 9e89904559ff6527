"""A store in step with its folders, whatever happened to the files or to the run before."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pathspec import GitIgnoreSpec

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders import forget_folder, sync, sync_folder, worker
from qwen_rerank.folders.converters import KINDS
from qwen_rerank.folders.records import RECORD
from qwen_rerank.folders.walk import without_retries
from qwen_rerank.store import FaissStore, StoreReadOnlyError
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

ROOT = Path(__file__).resolve().parents[2]


class Counting(HashEmbedder):
    """Counts the texts that it embeds."""

    def __init__(self):
        super().__init__(64)
        self.texts = []

    def embed_documents(self, texts):
        self.texts += texts
        return super().embed_documents(texts)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "笔记"
    (path / "sub").mkdir(parents=True)
    (path / "lease.md").write_text("# Lease\nThe lease ends in June.\n", encoding="utf-8")
    (path / "sub" / "狗.txt").write_text("狗在六点吃饭。", encoding="utf-8")
    return path


@pytest.fixture
def embedder():
    return Counting()


@pytest.fixture
def store(tmp_path, embedder):
    with FaissStore.create(tmp_path / "store", embedder) as made:
        yield made


def content(store):
    documents = sorted(store, key=lambda document: document.id)
    vectors = store.vectors_of([document.id for document in documents])
    return documents, vectors


def assert_equals_a_fresh_index(store, folder, tmp_path, **settings):
    with FaissStore.create(tmp_path / "fresh", HashEmbedder(64)) as fresh:
        sync_folder(fresh, [folder], **settings)
        expected, vectors = content(fresh)
    shutil.rmtree(tmp_path / "fresh")
    found, kept = content(store)
    assert found == expected
    np.testing.assert_array_equal(kept, vectors)


def test_a_passage_knows_its_file_its_lines_and_its_heading(store, folder):
    report = sync_folder(store, [folder])

    assert report.counts == {"added": 2, "changed": 0, "cut anew": 0, "unchanged": 0, "deleted": 0}
    lease, dog = store.get(["笔记/lease.md#1", "笔记/sub/狗.txt#1"])
    expected = {
        "source": "笔记/lease.md",
        "heading": "Lease",
        "line": 1,
        "last_line": 2,
        "part": 1,
        "parts": 1,
        "suffix": ".md",
    }
    assert expected.items() <= lease.metadata.items()
    assert (dog.text, dog.metadata["path"]) == ("狗在六点吃饭。", "sub/狗.txt")


def test_what_is_new_comes_what_changed_is_replaced_and_what_vanished_goes(store, folder, embedder):
    sync_folder(store, [folder])
    (folder / "lease.md").write_text("# Lease\nThe lease ends in July.\n", encoding="utf-8")
    (folder / "sub" / "狗.txt").unlink()
    (folder / "new.txt").write_text("new", encoding="utf-8")
    embedder.texts.clear()

    report = sync_folder(store, [folder])

    assert {(one.source, one.change) for one in report.files} == {
        ("笔记/lease.md", "changed"),
        ("笔记/new.txt", "added"),
        ("笔记/sub/狗.txt", "deleted"),
    }
    assert len(store) == len(embedder.texts) == 2


def test_nothing_is_embedded_again_for_a_rename_a_move_or_another_date(store, folder, embedder, tmp_path):
    sync_folder(store, [folder])
    before = store.ids()
    embedder.texts.clear()

    os.utime(folder / "lease.md", (1_000_000_000, 1_000_000_000))
    (folder / "sub" / "狗.txt").rename(folder / "sub" / "dog.txt")
    moved = folder.rename(tmp_path / "elsewhere")
    report = sync_folder(store, [moved])

    assert embedder.texts == []
    assert report.moved == {"笔记": (str(folder), str(moved))}
    assert set(store.ids()) == {before[0], "笔记/sub/dog.txt#1"}
    assert store.get([before[0]])[0].metadata["modified"] == "2001-09-09T01:46:40+00:00"


def test_two_folders_of_one_name_stay_apart_and_the_other_is_left_alone(store, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "docs").mkdir(parents=True)
        (tmp_path / name / "docs" / "README.md").write_text(f"This is {name}.")
        sync_folder(store, [tmp_path / name / "docs"])

    assert store.ids() == ["docs/README.md#1", "docs-2/README.md#1"]
    (tmp_path / "link").symlink_to(tmp_path / "a" / "docs")
    assert forget_folder(store, tmp_path / "link") == 1
    with pytest.raises(InvalidInputError, match="'docs' is no folder of this store; it has 'docs-2'"):
        forget_folder(store, "docs")


def test_a_folder_that_holds_another_takes_it_over(store, folder, embedder):
    sync_folder(store, [folder / "sub"])
    embedder.texts.clear()

    report = sync_folder(store, [folder])

    assert report.replaced == ["sub"]
    assert set(store.ids()) == {"笔记/lease.md#1", "笔记/sub/狗.txt#1"}
    assert embedder.texts == ["# Lease\nThe lease ends in June."]


def test_a_file_of_a_known_folder_is_brought_in_step_alone(store, folder):
    sync_folder(store, [folder])
    (folder / "lease.md").write_text("changed")
    (folder / "sub" / "狗.txt").unlink()

    assert sync_folder(store, [folder / "lease.md"]).counts["deleted"] == 0
    assert sync_folder(store, [folder / "sub"]).counts["deleted"] == 1
    assert store.ids() == ["笔记/lease.md#1"]


def test_other_settings_cut_anew_and_are_remembered(store, folder, tmp_path):
    (folder / "long.txt").write_text("The lease ends in June. " * 100)
    sync_folder(store, [folder])

    report = sync_folder(store, [folder], tokens=50, overlap=10)
    assert report.counts["cut anew"] == 3
    assert sync_folder(store, [folder]).counts["unchanged"] == 3
    assert_equals_a_fresh_index(store, folder, tmp_path, tokens=50, overlap=10)
    (store.path / RECORD).unlink()  # then only the documents tell where they come from
    assert sync_folder(store, [folder], tokens=50, overlap=10).counts["unchanged"] == 3


def test_everything_that_is_left_out_is_named(store, folder, tmp_path):
    (folder / ".hidden").write_text("x")
    (folder / "empty.md").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "broken.docx").write_text("x")
    (folder / "dead").symlink_to(tmp_path / "nowhere")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    (folder / os.fsdecode("中.txt".encode("gbk"))).write_text("x")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b", "price": NaN}\n')

    report = sync_folder(store, [folder])

    assert {one.where.removeprefix("笔记/"): one.reason.split(" (")[0] for one in report.skipped} == {
        ".hidden": "hidden",
        "empty.md": "the file is empty",
        "picture.png": "no kind that can be read",
        "broken.docx": "no readable .docx",
        "dead": "a link that leads nowhere",
        "linked": "a link; links are not followed",
        "pipe.txt": "no regular file",
        "\\xd6\\xd0.txt": "its name is no Unicode; rename it",
        "rows.jsonl:2": "'price' is nothing that JSON can carry",
    }
    assert report.counts["added"] == 3


def test_patterns_and_gitignore_say_what_is_read(store, folder):
    (folder / ".gitignore").write_text("sub/\n")
    (folder / "a.log").write_text("log")

    assert sync_folder(store, [folder], exclude=["*.log"], gitignore=True).counts["added"] == 1
    report = sync_folder(store, [folder], include=["*.log"], exclude=[], gitignore=False)
    assert (report.counts["deleted"], store.ids()) == (1, ["笔记/a.log#1"])


def test_one_pattern_may_be_a_string(store, folder):
    (folder / "a.tmp").write_text("junk")

    assert sync_folder(store, folder, exclude="*.tmp").counts["added"] == 2
    assert sync_folder(store, folder, include="*.md").counts["deleted"] == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"include": [""]}, "include must be patterns"),
        ({"exclude": 5}, "exclude must be patterns"),
        ({"gitignore": "no"}, "gitignore must be True or False, not 'no'"),
        ({"text_column": 5}, "text_column must be a string"),
        ({"paths": None}, "paths must be folders or files, not NoneType"),
        ({"paths": [None]}, "paths must be folders or files; None is neither"),
    ],
)
def test_a_wrong_setting_is_named(store, folder, given, says):
    with pytest.raises(InvalidInputError, match=says):
        sync_folder(store, **{"paths": [folder], **given})


@pytest.mark.parametrize("where", ["", "sub", "sub/狗.txt"])
@pytest.mark.parametrize("call", ["listdir", "stat", "lstat"])
def test_what_cannot_be_looked_into_has_not_vanished(store, folder, monkeypatch, where, call):
    """A drive that is away and a folder that may not be entered say nothing of their files."""
    sync_folder(store, [folder], include=["*.txt", "*.md"])  # of which a folder's name is none
    there, real = str(folder / where) if where else str(folder), getattr(os, call)

    def away(path=".", *args, **options):
        if str(path).startswith(there) and started:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *args, **options)

    started = []
    monkeypatch.setattr(os, call, away)
    monkeypatch.setattr(sync, "paths_to_record", lambda paths: started.append(1) or list(paths))
    report = sync_folder(store, [folder])

    assert (report.counts["deleted"], len(store)) == (0, 2)


def test_a_file_that_is_not_converted_this_time_keeps_what_is_stored(store, folder, monkeypatch):
    with monkeypatch.context() as patched:  # in this process, which is quicker
        patched.setitem(KINDS, ".html", replace(KINDS[".html"], outside=False))
        (folder / "page.html").write_text("<p>of before")
        sync_folder(store, [folder])
    (folder / "page.html").write_text("<p>of now")
    monkeypatch.setattr(worker, "_start", lambda: subprocess.Popen("true", stdin=-1, stdout=-1))

    report = sync_folder(store, [folder])

    assert [document.text for document in store if document.metadata["suffix"] == ".html"] == ["of before"]
    assert report.skipped[0].reason.endswith("leave it out or repair it; the store keeps what it had of it")


def test_a_folder_goes_into_a_wider_one_only_when_all_of_it_could_be_read(store, folder, monkeypatch):
    sync_folder(store, [folder / "sub"])
    with monkeypatch.context() as patched:
        patched.setattr(sync, "read_of_kind", lambda path, links: (path / "of a file").read_bytes())
        assert sync_folder(store, [folder]).replaced == []
    assert store.ids() == ["sub/狗.txt#1"]

    assert sync_folder(store, [folder]).replaced == ["sub"]
    assert set(store.ids()) == {"笔记/lease.md#1", "笔记/sub/狗.txt#1"}


def test_a_store_that_is_only_read_remembers_no_settings(store, folder):
    sync_folder(store, [folder])
    before = (store.path / RECORD).read_text()
    store.close()

    with FaissStore.open(store.path, None, read_only=True) as opened:
        with pytest.raises(StoreReadOnlyError):
            sync_folder(opened, [folder], exclude=["*.md"])
        with pytest.raises(StoreReadOnlyError):
            forget_folder(opened, folder)
    assert (store.path / RECORD).read_text() == before


def test_a_dry_run_says_the_same_and_writes_nothing(store, folder):
    planned = sync_folder(store, [folder], dry_run=True)
    assert (len(store), (store.path / RECORD).exists()) == (0, False)

    done = sync_folder(store, [folder])
    assert (planned.files, planned.skipped) == (done.files, done.skipped)


def test_a_path_that_does_not_exist_is_an_error(store, tmp_path):
    with pytest.raises(InvalidInputError, match="does not exist"):
        sync_folder(store, [tmp_path / "nothing"])
    with pytest.raises(InvalidInputError, match="paths is empty"):
        sync_folder(store, [])


@pytest.mark.parametrize(
    "metadata",
    [{}, {"folder": "笔记", "path": "a", "digest": "x"}, {"folder": "q", "path": "p", "digest": 1, "cut": 2}],
)
def test_what_came_in_other_ways_stays(store, folder, metadata):
    store.add([Document("mine", "by hand", metadata)])
    sync_folder(store, [folder])
    shutil.rmtree(folder / "sub")
    sync_folder(store, [folder])

    assert [document.text for document in store] == ["by hand", "# Lease\nThe lease ends in June."]


def edit(rng, folder):
    """Create, change, rename or delete a file; sentences come again in other files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sentences = [f"Sentence {n} about {rng.choice(['rent', 'dogs', '租约'])}." for n in rng.sample(range(12), 6)]
    action = rng.choice(["create", "create", "change", "rename", "delete", "grow"]) if files else "create"
    target = folder / rng.choice(["", "a", "a/b"]) / f"{rng.randrange(8)}{rng.choice(['.md', '.txt', '.csv', '.png'])}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if action == "create":
        target.write_text("\n\n".join(sentences), encoding="utf-8")
    elif action == "change":
        rng.choice(files).write_text("# T\n" + " ".join(sentences), encoding="utf-8")
    elif action == "grow":
        with rng.choice(files).open("a", encoding="utf-8") as file:
            file.write(" ".join(sentences * 5))
    elif action == "rename":
        rng.choice(files).replace(target)
    else:
        rng.choice(files).unlink()


def test_after_any_edits_the_store_equals_a_fresh_index(store, tmp_path, full):
    folder = tmp_path / "edited"
    folder.mkdir()
    rng = random.Random(7)
    for _ in range(300 if full else 12):
        for _ in range(rng.randrange(1, 4)):
            edit(rng, folder)
        sync_folder(store, [folder], tokens=32, overlap=8)
        assert_equals_a_fresh_index(store, folder, tmp_path, tokens=32, overlap=8)


_RUN = """
import sys
from qwen_rerank.folders import sync, sync_folder
from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
sync._BATCH = 3
with FaissStore.open_or_create(sys.argv[1], HashEmbedder(64)) as store:
    print("ready", flush=True)
    sync_folder(store, [sys.argv[2]], tokens=32, overlap=8)
print("done")
"""


def test_killed_at_any_moment_it_is_completed_by_the_next_run(tmp_path, full):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = random.Random(11)
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"File {n} about rent. " * rng.randrange(1, 40))
    command = [sys.executable, "-c", _RUN, str(tmp_path / "store"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    for _ in range(60 if full else 4):
        for path in rng.sample(sorted(folder.iterdir()), 5):
            path.write_text(f"Changed {rng.random()}. " * rng.randrange(1, 40))
        run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert run.stdout.readline() == b"ready\n"  # not before there is a store
        time.sleep(rng.random() * 0.5)
        run.send_signal(signal.SIGKILL)
        run.communicate()

    with FaissStore.open(tmp_path / "store", HashEmbedder(64)) as store:
        assert store.verify().ok
        sync_folder(store, [folder], tokens=32, overlap=8)
        assert_equals_a_fresh_index(store, folder, tmp_path, tokens=32, overlap=8)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        pytest.param("*.log\n!\n", "holds no rules of git", id="no rule"),
        pytest.param("x" * 5_000, "4096 characters", id="a name longer than any"),
        pytest.param("#\n" * 600_000, "larger than", id="a file of a megabyte"),
    ],
)
def test_rules_of_git_that_cannot_be_followed_are_named(store, folder, rules, says):
    (folder / ("a" * 200)).write_text("a")
    (folder / ".gitignore").write_text(rules)

    with pytest.raises(InvalidInputError, match=says):
        sync_folder(store, [folder], gitignore=True)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        pytest.param("*a*a*a*/" * 4 + "b", "/".join(["a" * 20] * 4 + ["c"]), id="stars of several names"),
        pytest.param("*a" * 40 + "b", "a" * 200, id="stars of one name"),
        pytest.param("**/a/" * 40 + "b", "a/" * 200 + "c", id="folders without end"),
    ],
)
def test_a_rule_of_git_takes_no_time_that_is_a_power_of_its_stars(tmp_path, rule, name):
    """In a process of its own: a regular expression that is tried on and on stops for nothing but the process's end."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("text")
    (tmp_path / ".gitignore").write_text(rule)
    code = f"""
from pathlib import Path
from qwen_rerank.folders.walk import Selection, walk
start = Path({str(tmp_path)!r})
print(sum(found.reason is None for found in walk(start, start, Selection(gitignore=True))))"""

    assert subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True).stdout == b"1\n"


RULES = st.lists(st.sampled_from(["a", "b", "*", "**", "/", "/**/", "?", "[ab]", "\\*"]), min_size=1, max_size=9)


@given(RULES, st.from_regex("(?:[ab*]{1,4}/){1,6}", fullmatch=True))
def test_a_rule_of_git_fits_what_it_fits_in_full(rule, name):
    for pattern in GitIgnoreSpec.from_lines(["".join(rule)]).patterns:
        if pattern.regex is not None:
            found, expected = re.search(without_retries(pattern.regex.pattern), name), pattern.regex.search(name)
            assert (found and found.groupdict()) == (expected and expected.groupdict()), pattern.regex


def test_a_file_of_terabytes_is_named_and_not_read(store, folder):
    with (folder / "big.md").open("wb") as file:
        file.truncate(1 << 41)

    skipped = sync_folder(store, [folder]).skipped

    assert [one.where for one in skipped] == ["笔记/big.md"]
    assert "of this kind at most" in skipped[0].reason
