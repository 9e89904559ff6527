"""Only regular files are opened: no pipe, device or socket, wherever a path comes from; each door by itself."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from qwen_rerank.calibration import Calibration
from qwen_rerank.documents import read_corpus
from qwen_rerank.embedders import load_embedder
from qwen_rerank.errors import CalibrationError, FileError, InvalidInputError, ModelError, StoreError
from qwen_rerank.evaluation.html_report import read_results
from qwen_rerank.folders import read_files
from qwen_rerank.models.folder import weight_names
from qwen_rerank.models.names import find_model
from qwen_rerank.models.onnx_graph import read_graph
from qwen_rerank.regular_files import open_regular, read_regular
from qwen_rerank.serve.auth import load_keys
from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


KINDS = [pipe, link_to_a_device, a_socket]
DOORS = {
    "a calibration": ("c.json", Calibration.load, CalibrationError),
    "a key file": ("keys", lambda path: load_keys(file=path), InvalidInputError),
    "a collection": ("docs.jsonl", read_corpus, FileError),
    "a compressed collection": ("docs.jsonl.gz", read_corpus, FileError),
    "files of a folder": ("notes.md", lambda path: read_files([path]), InvalidInputError),
    "an evaluation's result": ("result.json", lambda path: read_results(path.parent), InvalidInputError),
    "a graph": ("model.onnx", read_graph, ModelError),
    "weights": ("model.safetensors", lambda path: weight_names(path.parent), ModelError),
    "a model's folder": ("vocab.txt", lambda path: find_model(str(path.parent)), ModelError),
    "an embedder's folder": ("merges.txt", lambda path: load_embedder(str(path.parent)), ModelError),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path, monkeypatch, door, make):
    name, use, error = DOORS[door]
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *args, **kw: opened.append(os.fspath(path)) or real(path, *args, **kw))
    make(tmp_path / name)

    with pytest.raises(error, match=r"(no|nor a) regular file"):
        use(tmp_path / name)
    assert str(tmp_path / name) not in opened  # a device may do something when it is opened


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "documents.sqlite3",
        "documents.sqlite3-journal",
        "documents.sqlite3-wal",
        "commit.json",
        "seal.json",
        "writer.lock",
    ],
)
def test_what_is_no_regular_file_in_a_store_is_refused_and_never_waited_for(tmp_path, name, make):
    path = tmp_path / "store"
    with FaissStore.create(path, HashEmbedder(8)) as store:
        store.add(["a text"])
    (path / name).unlink(missing_ok=True)
    make(path / name)

    with pytest.raises(StoreError, match=r"no regular file|symbolic link|missing"):
        FaissStore.open(path, HashEmbedder(8))
    with pytest.raises(StoreError, match=r"no regular file|symbolic link|missing"):
        FaissStore.open(path, HashEmbedder(8), read_only=True)


def test_a_link_to_a_regular_file_is_followed_in_a_model_folder_and_refused_in_a_store(tmp_path):
    (tmp_path / "real").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert read_regular(tmp_path / "link") == b"content"
    with pytest.raises(OSError, match="symbolic link"):
        open_regular(tmp_path / "link", links=False)


def test_a_file_that_is_replaced_by_a_pipe_at_the_last_moment_is_not_waited_for(tmp_path, monkeypatch):
    path, regular = tmp_path / "file", tmp_path / "regular"
    regular.touch()
    pipe(path)
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda _, **options: real(regular, **options))

    with pytest.raises(OSError, match="no regular file"):
        open_regular(path)


def test_a_model_folder_of_links_to_files_is_taken(tmp_path):
    """The hub's cache is made of them."""
    folder = Path(__file__).resolve().parents[1] / "src/qwen_rerank/pocket/embedder"
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(folder, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)

    assert load_embedder(str(snapshot)).embed_queries(["a"]).shape[0] == 1
