"""Whatever happens to the files: a typed error, or the same answers as before. Never others."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from qwen_rerank.store import CorruptStoreError, FaissStore, verify_store
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

EMBEDDER = HashEmbedder(16)
DURABLE = ["documents.sqlite3", "commit.json"]
QUERIES = ["red apple", "tree", "number 3"]


def make(path: Path, *, extra: int = 0) -> Path:
    with FaissStore.create(path, EMBEDDER) as store:
        store.add([Document(f"d{i}", f"a red apple, number {i}", {"even": i % 2 == 0}) for i in range(30)])
        store.delete(["d7"])
        store.upsert([Document("d8", "a tree, number 8"), Document("marks", "?!")])
        for i in range(extra):
            store.add([Document(f"later{i}", f"a later tree {i}")])
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sound") / "store")


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def answers(path: Path, **options):
    """Everything that a store can be asked."""
    with FaissStore.open(path, EMBEDDER, **options) as store:
        everything = store.get([f"d{i}" for i in range(30)] + ["marks"])
        found = [
            store.search(query, top_k, mode=mode, filter=f)
            for query in QUERIES
            for mode in ("dense", "lexical", "hybrid")
            for top_k in (3, 99)
            for f in (None, {"even": True})
        ]
        return len(store), store.without_vector, everything, found


def same_or_corrupt(path: Path, expected) -> bool:
    """Return whether the damage was noticed; fail if it changed an answer."""
    try:
        found = answers(path)
    except CorruptStoreError:
        return True
    assert found == expected
    return False


def index_file(path: Path) -> Path:
    (found,) = path.glob("index-*.faiss")
    return found


def words_file(path: Path) -> Path:
    (found,) = path.glob("words-*.bin")
    return found


def data_files(path: Path) -> list[Path]:
    return [*(path / name for name in [*DURABLE, "seal.json"]), index_file(path), words_file(path)]


def damaged_copies(sound, tmp_path, n, damage, seed=0):
    """Yield (file name, path) of `n` copies, each with damage in one place of one file."""
    rng = random.Random(seed)
    for i in range(n):
        path = tmp_path / f"copy{i}"
        shutil.copytree(sound, path)
        file = rng.choice(data_files(path))
        data = bytearray(file.read_bytes())
        damage(rng, data)
        file.write_bytes(data)
        yield file.name, path
        shutil.rmtree(path)


def flip(rng, data):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_in_header(rng, data):
    data[rng.randrange(min(100, len(data)))] ^= 1 << rng.randrange(8)


def zero_page(rng, data):
    start = rng.randrange(0, len(data), 4096)
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))


def truncate(rng, data):
    del data[rng.randrange(len(data)) :]


def empty(rng, data):
    data.clear()


def extend(rng, data):
    data += rng.randbytes(rng.randrange(1, 10_000))


@pytest.mark.parametrize("damage", [flip, flip_in_header, zero_page, truncate, empty, extend], ids=lambda f: f.__name__)
def test_damage_is_noticed_or_changes_nothing(sound, tmp_path, full, damage):
    expected = answers(sound)
    n = {flip: 60, flip_in_header: 20}.get(damage, 8) * (40 if full else 1)

    noticed = sum(same_or_corrupt(path, expected) for _, path in damaged_copies(sound, tmp_path, n, damage))

    assert noticed > 0


@pytest.mark.parametrize("name", DURABLE)
@pytest.mark.parametrize("damage", [truncate, empty], ids=lambda f: f.__name__)
def test_a_shortened_database_is_always_noticed(copy, name, damage):
    data = bytearray((copy / name).read_bytes())
    damage(random.Random(1), data)
    (copy / name).write_bytes(data)

    with pytest.raises(CorruptStoreError, match=name):
        FaissStore.open(copy, EMBEDDER)


@pytest.mark.parametrize(
    "damage", [flip, zero_page, truncate, empty, extend, None], ids=lambda f: getattr(f, "__name__", "delete")
)
@pytest.mark.parametrize("which", [index_file, words_file], ids=["faiss", "words"])
def test_a_bad_index_file_is_built_again_and_logged(sound, copy, caplog, damage, which):
    file = which(copy)
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage is not None:
        damage(random.Random(2), data)
        file.write_bytes(data)

    assert answers(copy, read_only=True) == answers(sound)
    assert "is built again" in caplog.text
    answers(copy)  # writes it anew
    caplog.clear()
    assert answers(copy) == answers(sound)
    assert "built again" not in caplog.text


@pytest.mark.parametrize("name", DURABLE)
@pytest.mark.parametrize("read_only", [True, False])
def test_a_deleted_database_is_never_an_empty_store(copy, name, read_only):
    (copy / name).unlink()

    with pytest.raises(CorruptStoreError, match=name):
        FaissStore.open(copy, EMBEDDER, read_only=read_only)
    assert not verify_store(copy).ok


@pytest.mark.parametrize("name", DURABLE)
def test_a_file_of_another_store_is_noticed(copy, tmp_path, name):
    other = make(tmp_path / "other")  # the same documents, commit by commit
    shutil.copy(other / name, copy / name)

    with pytest.raises(CorruptStoreError):
        FaissStore.open(copy, EMBEDDER)


def test_an_older_database_is_noticed(sound, tmp_path):
    newer = Path(shutil.copytree(sound, tmp_path / "newer"))
    with FaissStore.open(newer, EMBEDDER) as store:
        store.delete(["d1"])
    shutil.copy(sound / "documents.sqlite3", newer / "documents.sqlite3")

    with pytest.raises(CorruptStoreError, match="ends at commit 3, but 4 was acknowledged"):
        FaissStore.open(newer, EMBEDDER)


@pytest.mark.parametrize("commits", [2, 3])
def test_a_commit_record_further_behind_than_a_crash_can_leave_it_is_noticed(sound, tmp_path, commits):
    newer = Path(shutil.copytree(sound, tmp_path / "newer"))
    with FaissStore.open(newer, EMBEDDER) as store:
        for i in range(commits):
            store.delete([f"d{i}"])
    shutil.copy(sound / "commit.json", newer / "commit.json")

    with pytest.raises(CorruptStoreError, match="not what commit 3"):
        FaissStore.open(newer, EMBEDDER)


def test_a_commit_record_one_behind_is_what_a_crash_leaves(sound, tmp_path):
    newer = Path(shutil.copytree(sound, tmp_path / "newer"))
    with FaissStore.open(newer, EMBEDDER) as store:
        store.delete(["d1"])
    expected = answers(newer)
    acknowledged = (newer / "commit.json").read_bytes()
    shutil.copy(sound / "commit.json", newer / "commit.json")

    assert answers(newer, read_only=True) == expected
    assert answers(newer) == expected
    assert (newer / "commit.json").read_bytes() == acknowledged


def test_another_history_of_the_same_store_is_noticed(sound, tmp_path):
    """A backup that went on by itself has the same identity and as many commits."""
    branches = [Path(shutil.copytree(sound, tmp_path / name)) for name in ("one", "two")]
    for path, text in zip(branches, ["left", "right"], strict=True):
        with FaissStore.open(path, EMBEDDER) as store:
            store.add([Document("new", text)])
    shutil.copy(branches[0] / "documents.sqlite3", branches[1] / "documents.sqlite3")

    with pytest.raises(CorruptStoreError, match="not what commit"):
        FaissStore.open(branches[1], EMBEDDER)


@pytest.mark.parametrize("extra", [1, 2])
def test_a_faiss_file_of_another_store_or_time_is_not_used(sound, copy, tmp_path, caplog, extra):
    other = make(tmp_path / "other", extra=extra)
    shutil.copy(index_file(other), index_file(copy))

    assert answers(copy) == answers(sound)
    assert "does not match" in caplog.text


def test_an_older_faiss_file_is_caught_up(sound, tmp_path):
    """What a crash leaves: the database went on, the file did not."""
    path = Path(shutil.copytree(sound, tmp_path / "newer"))
    store = FaissStore.open(path, EMBEDDER)
    store.add([Document("new", "a new tree")])
    store.delete(["d3"])
    store.upsert([Document("d4", "number 4 again")])
    crashed = Path(shutil.copytree(path, tmp_path / "crashed"))
    store.close()

    assert answers(crashed) == answers(path)


EDITS = {
    "row removed": "DELETE FROM documents WHERE id = 'd3'",
    "row and vector removed": "DELETE FROM vectors WHERE row = 4; DELETE FROM documents WHERE row = 4",
    "text changed": "UPDATE documents SET text = 'other' WHERE id = 'd3'",
    "metadata changed": "UPDATE documents SET metadata = '{\"even\":true}' WHERE id = 'd3'",
    "id changed": "UPDATE documents SET id = 'e3' WHERE id = 'd3'",
    "vector declared absent": "UPDATE documents SET vector_digest = NULL WHERE id = 'd3'",
    "type changed": "UPDATE documents SET vector_digest = 7 WHERE id = 'd3'",
    "rows exchanged": "UPDATE documents SET row = -1 WHERE row = 4; UPDATE documents SET row = 4 WHERE row = 5; "
    "UPDATE documents SET row = 5 WHERE row = -1",
    "row copied": "INSERT INTO documents SELECT 999, 'copy', text, metadata, vector_digest, digest FROM documents WHERE id = 'd3'",
    "vectors exchanged with their digests": "UPDATE vectors SET row = -1 WHERE row = 4; "
    "UPDATE vectors SET row = 4 WHERE row = 5; UPDATE vectors SET row = 5 WHERE row = -1; "
    "CREATE TEMP TABLE old AS SELECT row, vector_digest AS digest FROM documents; UPDATE documents SET vector_digest = "
    "(SELECT digest FROM old WHERE old.row = 9 - documents.row) WHERE row IN (4, 5)",
    "settings changed": "UPDATE state SET settings = replace(settings, 'cosine', 'ip')",
    "settings unreadable": "UPDATE state SET settings = '{'",
    "commit number changed": "UPDATE state SET number = number + 1",
    "row number put back": "UPDATE state SET next_row = 1",
    "state removed": "DELETE FROM state",
    "trigger added": "CREATE TRIGGER evil AFTER INSERT ON documents BEGIN DELETE FROM documents; END",
    "index dropped": "CREATE TABLE more (x); DROP TABLE vectors",
}


def edit(path: Path, script: str) -> None:
    connection = sqlite3.connect(path / "documents.sqlite3")
    connection.executescript(script)
    connection.close()


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_database_is_noticed(copy, what):
    edit(copy, EDITS[what])

    for read_only in (True, False):
        with pytest.raises(CorruptStoreError, match=r"documents\.sqlite3"):
            FaissStore.open(copy, EMBEDDER, read_only=read_only)
    assert not verify_store(copy).ok


@pytest.mark.parametrize("byte", [0xE5, 0x00, 0x27, ord("X")])
def test_a_damaged_schema_is_noticed(copy, byte):
    """SQLite quotes the schema in its message, which then may be no text."""
    file = copy / "documents.sqlite3"
    data = bytearray(file.read_bytes())
    data[data.index(b"CREATE TABLE documents") + 13] = byte
    file.write_bytes(data)

    with pytest.raises(CorruptStoreError, match=r"documents\.sqlite3"):
        FaissStore.open(copy, EMBEDDER)
    assert not verify_store(copy).ok


@pytest.mark.parametrize(
    "change", ["DELETE FROM vectors WHERE row = 4", "UPDATE vectors SET vector = zeroblob(64) WHERE row = 4"]
)
def test_a_damaged_vector_is_noticed_when_it_is_needed(sound, copy, change):
    edit(copy, change)

    assert answers(copy) == answers(sound)  # the FAISS file still has the vector
    assert verify_store(copy).damaged_ids == ("d3",)
    index_file(copy).unlink()
    with pytest.raises(CorruptStoreError, match="vector"):
        FaissStore.open(copy, EMBEDDER)


def test_verify_names_the_damaged_documents(copy):
    edit(copy, "UPDATE documents SET text = 'other' WHERE id IN ('d3', 'd5')")

    report = verify_store(copy)

    assert (report.damaged_ids, report.ok) == (("d3", "d5"), False)
    assert any("does not match its digest" in problem for problem in report.problems)


def test_verify_finds_an_index_that_lies(sound, copy):
    with FaissStore.open(copy, EMBEDDER) as store:
        assert store.verify().ok
        store._vectors.index._base.reset()
        store._vectors.index._base.add(np.ones((31, 16), np.float32))

        assert store.verify().problems == ("the vectors of the FAISS index are not those of the database",)


def test_verify_finds_words_that_lie(copy):
    with FaissStore.open(copy, EMBEDDER) as store:
        store._words.index._parts[0].counts[3] += 1

        assert store.verify().problems == ("the words index is not that of the documents' texts",)


def test_a_faiss_file_is_not_opened_before_its_hash_is_right(copy, monkeypatch):
    """FAISS trusts what it reads: a crafted file can name other files or ask for any amount of memory."""
    import faiss

    file = index_file(copy)
    file.write_bytes(b"ilod" + (2**62).to_bytes(8, "little") + b"/etc/passwd")
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("an unverified file was given to FAISS"))

    with FaissStore.open(copy, EMBEDDER) as store:
        assert len(store.search("apple", 99)) == 29


@pytest.mark.parametrize("name", ["../elsewhere.faiss", "/etc/passwd", "index-0.faiss", "commit.json"])
def test_the_database_cannot_name_a_file_outside(sound, copy, caplog, name):
    edit(copy, f"UPDATE index_file SET name = '{name}'")

    assert answers(copy, read_only=True) == answers(sound)
    assert "its name is" in caplog.text


def test_another_kind_of_faiss_index_is_not_used(sound, copy, caplog):
    """Even one that the database vouches for."""
    import hashlib

    import faiss

    file = index_file(copy)
    faiss.write_index(faiss.IndexFlatL2(16), str(file))
    edit(copy, f"UPDATE index_file SET sha256 = '{hashlib.sha256(file.read_bytes()).hexdigest()}'")

    assert answers(copy) == answers(sound)
    assert "it is a IndexFlatL2" in caplog.text


def test_a_pickle_in_the_folder_is_never_opened(copy, tmp_path):
    canary = tmp_path / "canary"
    payload = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    for name in ("index.pkl", "vectors.npy", "index-0123456789abcdef.faiss", "commit.json.tmp"):
        (copy / name).write_bytes(payload)

    answers(copy)

    assert not canary.exists()
    assert (copy / "index.pkl").exists()  # not ours, so left alone
    assert not (copy / "index-0123456789abcdef.faiss").exists()
    assert not (copy / "commit.json.tmp").exists()


@pytest.mark.parametrize("junk", [b"", b"junk" * 3000, bytes(9000)])
def test_a_foreign_journal_is_noticed_or_changes_nothing(sound, copy, junk):
    (copy / "documents.sqlite3-journal").write_bytes(junk)

    same_or_corrupt(copy, answers(sound))
