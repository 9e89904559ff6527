"""Export to a plain FAISS file with documents beside it, and import from one, or from a folder of LangChain's FAISS store.

An export loads into LangChain's store, from the package `langchain-community`, in five lines:

    rows = [json.loads(line) for line in open("export/documents.jsonl", encoding="utf-8")]
    documents = {r["id"]: Document(page_content=r["text"], metadata=r["metadata"], id=r["id"]) for r in rows}
    index = faiss.read_index("export/index.faiss")
    places = {place: row["id"] for place, row in enumerate(rows)}
    store = FAISS(embeddings, index, InMemoryDocstore(documents), places, distance_strategy="MAX_INNER_PRODUCT")

LangChain keeps its documents in a pickle. It is read here opcode by opcode: strings, numbers, lists and dicts are built,
nothing is imported and nothing is called.
"""

from __future__ import annotations

import json
import os
import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.regular_files import open_regular
from qwen_rerank.store.commits import RECORD_FILE
from qwen_rerank.store.errors import StoreIOError
from qwen_rerank.store.faiss_build import load_faiss
from qwen_rerank.store.faiss_store import FaissStore
from qwen_rerank.store.files import check_regular, explained
from qwen_rerank.types import Document

INDEX, DOCUMENTS, PICKLE = "index.faiss", "documents.jsonl", "index.pkl"
_AT_ONCE = 10_000  # documents written at a time
_FLAT = (b"IxF2", b"IxFI", b"IxFl")
_WITH_IDS = (b"IxMp", b"IxM2")


@dataclass(frozen=True, slots=True)
class ImportedDocuments:
    """Documents with their vectors.

    Attributes:
        documents: In the order of the vectors.
        vectors: float32 `(n_documents, dim)`.
    """

    documents: list[Document]
    vectors: np.ndarray


def export_store(store: FaissStore, folder: str | os.PathLike[str]) -> int:
    """Write the documents that have a vector, and a Flat inner-product index of their vectors; return how many.

    Args:
        store: What is exported; one commit at a time is read.
        folder: Made if it is not there; gets `index.faiss` and `documents.jsonl`, a line for each vector in order.

    Raises:
        InvalidInputError: If the folder is a store, or has something other than files under those names.
        StoreError: If it cannot be written.
    """
    target = Path(folder)
    if (target / RECORD_FILE).exists():
        raise InvalidInputError(f"{target} is a store; name another folder for the export.")
    faiss = load_faiss()
    index = faiss.IndexFlatIP(store.dim)
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in (INDEX, DOCUMENTS):  # a pipe would be waited for, and a link written through
            check_regular(target / name)
        with (target / DOCUMENTS).open("w", encoding="utf-8") as lines:
            documents = iter(store)
            while batch := list(islice(documents, _AT_ONCE)):
                vectors = store.vectors_of([document.id for document in batch])
                for document, vector in zip(batch, vectors, strict=True):
                    if vector.any():
                        fields = {"id": document.id, "text": document.text, "metadata": document.metadata}
                        lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
                index.add(vectors[vectors.any(axis=1)])
    try:
        faiss.write_index(index, str(target / INDEX))
    except RuntimeError as exc:
        raise StoreIOError(f"{target / INDEX} could not be written ({exc}); name a folder with room.") from exc
    return int(index.ntotal)


def read_export(folder: str | os.PathLike[str]) -> ImportedDocuments:
    """Return documents and vectors of a folder with `index.faiss` beside `documents.jsonl` or LangChain's `index.pkl`.

    Raises:
        InvalidInputError: If a file is missing, is of another kind, or the two do not belong together.
    """
    source = Path(folder)
    vectors = read_flat_vectors(source / INDEX)
    documents = _from_lines(source / DOCUMENTS) if (source / DOCUMENTS).exists() else _from_pickle(source / PICKLE)
    if len(documents) != len(vectors):
        raise InvalidInputError(
            f"{source} has {len(vectors)} vectors for {len(documents)} documents; they do not belong together."
        )
    return ImportedDocuments(documents, vectors)


def read_flat_vectors(path: Path) -> np.ndarray:
    """Return the vectors of a FAISS file that holds them as they are, float32 `(n, dim)`.

    FAISS itself trusts what it reads: a crafted file can name other files or ask for any amount of memory. So the one
    layout that matters is read here, and its sizes are compared with the file's.

    Raises:
        InvalidInputError: If the file is missing or holds another kind of index.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        kind = file.read(4)
        if kind in _WITH_IDS:
            _header(file, path)
            kind = file.read(4)
        if kind not in _FLAT:
            raise InvalidInputError(
                f"{path} is no Flat FAISS index ({kind!r}); export one with IndexFlatIP or IndexFlatL2."
            )
        dim, count = _header(file, path)
        (length,) = struct.unpack("<Q", _exactly(file, 8, path))
        if length != dim * count or 4 * length > size:
            raise InvalidInputError(f"{path} says that it holds {count} vectors of {dim}, which its size contradicts.")
        return np.frombuffer(_exactly(file, 4 * length, path), dtype="<f4").reshape(count, dim).astype(np.float32)


def _header(file: BinaryIO, path: Path) -> tuple[int, int]:
    dim, count, _, _, _, metric = struct.unpack("<iqqqBi", _exactly(file, 33, path))
    if metric > 1:
        _exactly(file, 4, path)
    if dim < 1 or count < 0:
        raise InvalidInputError(f"{path} says that it holds {count} vectors of {dim}; it is damaged.")
    return dim, count


def _exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise InvalidInputError(f"{path} is shorter than it says; it is damaged.")
    return data


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path, links=False)
    except OSError as exc:
        raise InvalidInputError(
            f"{path} cannot be read ({exc.strerror}); give a folder with {INDEX} and {DOCUMENTS} or {PICKLE}."
        ) from exc


def _from_lines(path: Path) -> list[Document]:
    documents = []
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                documents.append(Document(row["id"], row["text"], row.get("metadata") or {}))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
                raise InvalidInputError(f"{path}:{number} is no object with id and text ({exc}).") from exc
    return documents


# LangChain's pickle


@dataclass(slots=True)
class _Named:
    """A class that a pickle names; it is never looked up."""

    name: str


@dataclass(slots=True)
class _Made:
    """An object that a pickle would make; it is never made."""

    kind: str
    state: Any = None


_CLASSES = {"InMemoryDocstore", "Document", "object", "set", "_reconstructor"}
_MODULES = ("langchain", "copyreg", "copy_reg", "builtins", "__builtin__")


def _from_pickle(path: Path) -> list[Document]:
    with _opened(path) as file:
        data = file.read()
    try:
        store, ids = _Pickle(data).value()
        texts = store.state["_dict"]
        found = [texts[ids[place]] for place in range(len(ids))]
        return [_document(ids[place], made) for place, made in enumerate(found)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
        raise InvalidInputError(f"{path} is no pickle of LangChain's FAISS store ({exc}).") from exc


def _document(id: str, made: _Made) -> Document:
    if made.kind != "Document":
        raise ValueError(f"it holds a {made.kind} in place of a document")
    fields = made.state.get("__dict__", made.state)
    return Document(id, fields["page_content"], fields.get("metadata") or {})


class _Pickle:
    """Builds what a pickle describes out of plain values, without importing or calling anything.

    Args:
        data: The pickle.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def value(self) -> Any:
        """Return what the pickle describes.

        Raises:
            ValueError: If it names a class or uses an opcode that LangChain's store does not.
        """
        for opcode, argument, _ in pickletools.genops(self._data):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case _ if name in _PLAIN:
                self._stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE" | "EMPTY_SET":
                self._stack.append(
                    {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}[name]()
                )
            case "MARK":
                self._marks.append(len(self._stack))
            case "TUPLE" | "LIST" | "FROZENSET":
                self._stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[name](self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._stack.append(tuple(self._popped(int(name[-1]))))
            case "DICT":
                self._stack.append(dict(_pairs(self._marked())))
            case "APPEND" | "APPENDS":
                items = [self._stack.pop()] if name == "APPEND" else self._marked()
                self._stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._popped(2) if name == "SETITEM" else self._marked()
                self._stack[-1].update(_pairs(items))
            case "ADDITEMS":
                items = self._marked()
                self._stack[-1].update(items)
            case "POP":
                self._stack.pop()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                module, kind = argument.split(" ", 1) if name == "GLOBAL" else self._popped(2)
                self._stack.append(_named(module, kind))
            case "NEWOBJ" | "REDUCE":
                kind, arguments = self._popped(2)
                if kind.name == "set":  # how older protocols write one
                    self._stack.append(set(arguments[0]))
                else:
                    # copyreg's helper gets the class as its first argument.
                    made = arguments[0] if kind.name == "_reconstructor" else kind
                    self._stack.append(_Made(made.name))
            case "BUILD":
                state = self._stack.pop()
                self._stack[-1].state = state
            case _:
                raise ValueError(f"it uses the opcode {name}")

    def _marked(self) -> list[Any]:
        start = self._marks.pop()
        items, self._stack[start:] = self._stack[start:], []
        return items

    def _popped(self, count: int) -> list[Any]:
        items, self._stack[-count:] = self._stack[-count:], []
        if len(items) != count:
            raise ValueError("it takes more than there is")
        return items


_PLAIN = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
    ]
)


def _named(module: object, kind: object) -> _Named:
    if not isinstance(module, str) or kind not in _CLASSES or not module.startswith(_MODULES):
        raise ValueError(f"it names {module}.{kind}, which is not read")
    return _Named(str(kind))


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)
