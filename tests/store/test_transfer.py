"""Exports that FAISS and LangChain load, and imports that trust nothing."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from types import ModuleType

import faiss
import numpy as np
import pytest
from langchain_core.documents import Document as LangChainDocument

from qwen_rerank import Document, FaissStore
from qwen_rerank.errors import InvalidInputError, StoreError
from qwen_rerank.store import export_store, read_export
from tests.store.conftest import FRUIT


def test_an_export_comes_back_as_the_store_that_it_was(store, tmp_path, embedder):
    store.add([Document("marks", "?!")])

    assert export_store(store, tmp_path / "export") == len(FRUIT)
    read = read_export(tmp_path / "export")
    assert read.documents == FRUIT
    with FaissStore.create(tmp_path / "again", embedder) as again:
        again.add(read.documents, vectors=read.vectors)
        assert again.search("red apple", 3) == store.search("red apple", 3)


def test_an_export_is_what_faiss_reads(store, tmp_path, embedder):
    export_store(store, tmp_path / "export")
    index = faiss.read_index(str(tmp_path / "export" / "index.faiss"))
    lines = (tmp_path / "export" / "documents.jsonl").read_text(encoding="utf-8").splitlines()

    _, found = index.search(embedder.embed_queries(["red apple"]), 1)
    assert json.loads(lines[found[0, 0]])["id"] == "apple"


class InMemoryDocstore:
    """As langchain-community's: documents by id."""

    def __init__(self, documents):
        self._dict = documents


@pytest.fixture
def langchain_folder(tmp_path, monkeypatch):
    """A folder as LangChain's `FAISS.save_local` writes it."""
    home = "langchain_community.docstore.in_memory"
    module = ModuleType(home)
    module.InMemoryDocstore = InMemoryDocstore
    for name in (home, "langchain_community", "langchain_community.docstore"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(InMemoryDocstore, "__module__", home)
    index = faiss.IndexFlatL2(2)
    index.add(np.array([[3, 4], [0, 1]], np.float32))
    faiss.write_index(index, str(tmp_path / "index.faiss"))

    def write(protocol=4, extra=None):
        documents = {
            "b": LangChainDocument(page_content="second", metadata={"n": [1, 2.5, None, True, {"k": "v"}]}, id="b"),
            "a": LangChainDocument(page_content="第一", metadata=extra or {}),
        }
        data = pickle.dumps((InMemoryDocstore(documents), {0: "a", 1: "b"}), protocol=protocol)
        (tmp_path / "index.pkl").write_bytes(data)
        return tmp_path

    return write


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_folder_of_langchains_store_is_read(langchain_folder, protocol):
    read = read_export(langchain_folder(protocol))

    assert read.documents == [Document("a", "第一"), Document("b", "second", {"n": [1, 2.5, None, True, {"k": "v"}]})]
    assert read.vectors.tolist() == [[3, 4], [0, 1]]


class Evil:
    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_is_called_or_imported(langchain_folder, monkeypatch, tmp_path, protocol):
    monkeypatch.chdir(tmp_path)
    folder = langchain_folder()
    (folder / "index.pkl").write_bytes(pickle.dumps((Evil(), {}), protocol=protocol))

    with pytest.raises(InvalidInputError, match="no pickle of LangChain's FAISS store"):
        read_export(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        pickle.dumps(3),
        pickle.dumps(({}, {})),
        b"cos\nsystem\n(S'true'\ntR.",
        b"clangchain.x\nEvil\n.",
        b"\x80\x04" + b"0" * 9 + b".",
        b"(" * 50,
    ],
)
def test_what_is_no_such_pickle_is_refused(langchain_folder, data):
    folder = langchain_folder()
    (folder / "index.pkl").write_bytes(data)

    with pytest.raises(InvalidInputError, match="no pickle"):
        read_export(folder)


def test_a_damaged_pickle_is_refused_or_gives_documents(langchain_folder):
    folder = langchain_folder()
    sound = (folder / "index.pkl").read_bytes()
    for place in range(len(sound)):
        (folder / "index.pkl").write_bytes(sound[:place] + bytes([sound[place] ^ 0x15]) + sound[place + 1 :])
        try:
            assert len(read_export(folder).documents) == 2
        except InvalidInputError:
            continue


FLAT = b"IxFI" + struct.pack("<iqqqBi", 2, 1, 0, 0, 1, 0) + struct.pack("<Qff", 2, 1.0, 2.0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"ilod" + FLAT[4:],
        FLAT[:-1],
        FLAT[:20],
        FLAT.replace(struct.pack("<q", 1), struct.pack("<q", 2**62), 1),
        FLAT.replace(struct.pack("<i", 2), struct.pack("<i", -2), 1),
        b"IHNf" + FLAT[4:],
    ],
)
def test_a_faiss_file_of_another_kind_or_size_is_refused(tmp_path, data):
    (tmp_path / "index.faiss").write_bytes(data)
    (tmp_path / "documents.jsonl").write_text('{"id": "a", "text": "b"}\n')

    with pytest.raises(InvalidInputError, match=r"index\.faiss"):
        read_export(tmp_path)


@pytest.mark.parametrize("lines", ["", '{"id": "a"}\n', "[]\n", '{"id": "a", "text": "b"}\n' * 2])
def test_lines_that_do_not_fit_are_refused(tmp_path, lines):
    (tmp_path / "index.faiss").write_bytes(FLAT)
    (tmp_path / "documents.jsonl").write_text(lines)

    with pytest.raises(InvalidInputError, match=r"id and text|do not belong together"):
        read_export(tmp_path)


def test_an_index_with_ids_around_it_is_read(tmp_path):
    index = faiss.IndexIDMap(faiss.IndexFlatIP(2))
    index.add_with_ids(np.array([[1, 2]], np.float32), np.array([7]))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    (tmp_path / "documents.jsonl").write_text('{"id": "a", "text": "b"}\n')

    assert read_export(tmp_path).vectors.tolist() == [[1, 2]]


def test_an_export_goes_into_files_of_its_own(store, tmp_path):
    """No pipe is waited for, no link written through, and no store gets what is no part of it."""
    for name in ("index.faiss", "documents.jsonl"):
        for kind in ("pipe", "link"):
            target = tmp_path / f"{kind} {name}"
            target.mkdir()
            os.mkfifo(target / name) if kind == "pipe" else (target / name).symlink_to(tmp_path / "elsewhere")
            with pytest.raises(StoreError, match=r"no regular file|symbolic link"):
                export_store(store, target)
    assert not (tmp_path / "elsewhere").exists()

    with pytest.raises(InvalidInputError, match="is a store; name another folder"):
        export_store(store, store.path)
