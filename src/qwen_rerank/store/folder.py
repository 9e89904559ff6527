"""The folder of a store: making it, checking that what is in it is a sound store, and saying what is damaged."""

from __future__ import annotations

import os
import secrets
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import Embedder
from qwen_rerank.store.access import LOCK_FILE
from qwen_rerank.store.commits import RECORD_FILE, Commit, CommitRecord, StoreSettings, read_commit_record
from qwen_rerank.store.database import DATABASE_FILE, JOURNAL_FILE, Database
from qwen_rerank.store.errors import (
    CorruptStoreError,
    EmbedderMismatchError,
    NotAStoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from qwen_rerank.store.files import explained, sync_folder
from qwen_rerank.store.index import VectorIndex


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a store's folder."""
    try:
        text = os.fspath(path)
        if not isinstance(text, str) or not text:
            raise ValueError("it is no text")
        return Path(os.path.realpath(text))
    except (TypeError, ValueError) as exc:
        raise InvalidInputError(f"path must be the path of a folder, not {path!r}: {exc}.") from exc


def new_settings(embedder: Embedder, *, metric: str, index: str, indexed_fields: tuple[str, ...]) -> StoreSettings:
    """Return the settings of a new store, with an identity of its own."""
    return StoreSettings(
        store=uuid.uuid4().hex,
        embedder=str(getattr(embedder, "name", "")),
        fingerprint=embedder.fingerprint,
        dim=embedder.dim,
        metric=metric,
        index=index,
        indexed_fields=indexed_fields,
    )


def make_store(folder: Path, settings: StoreSettings) -> None:
    """Make an empty store; it is there as a whole or not at all.

    Raises:
        StoreExistsError: If something is at that path already, other than an empty folder.
    """
    first = Commit(number=0, next_row=1, previous="", content=0, documents=0, without_vector=0)
    with explained(folder):
        if folder.exists() and not (folder.is_dir() and _is_empty(folder)):
            raise StoreExistsError(f"{folder} is there already; open it with FaissStore.open, or choose another path.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Short, so that a folder whose name is as long as names may be can still be made.
        making = folder.parent / f".{secrets.token_hex(8)}.making"
        making.mkdir()
        try:
            _fill(making, settings, first)
            os.rename(making, folder)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        sync_folder(folder.parent)


def _fill(folder: Path, settings: StoreSettings, first: Commit) -> None:
    database = Database(folder, read_only=False, writable=True, create=True)
    try:
        database.create(settings, first)
    finally:
        database.close()
    committed = first.record(settings)
    committed.acknowledge(folder, committed.prepare(folder))


def check_folder(folder: Path) -> CommitRecord:
    """Return the commit record of a folder that holds the files of a store.

    Raises:
        StoreNotFoundError: If nothing is there.
        NotAStoreError: If something else is.
        CorruptStoreError: If a file of the store is missing, damaged or a symbolic link.
        FormatTooNewError: If a newer version of this package wrote it.
    """
    with explained(folder):
        if not folder.exists() or (folder.is_dir() and _is_empty(folder)):
            raise StoreNotFoundError(
                f"No store is at {folder}; make one with FaissStore.create or `qwen-rerank index`."
            )
        if not folder.is_dir() or not any((folder / name).exists() for name in (DATABASE_FILE, RECORD_FILE)):
            raise NotAStoreError(f"{folder} is not a store; make one with FaissStore.create at another path.")
        for name in (DATABASE_FILE, JOURNAL_FILE, RECORD_FILE, LOCK_FILE):
            if (folder / name).is_symlink():
                raise CorruptStoreError(folder / name, "it is a symbolic link")
        if not (folder / DATABASE_FILE).is_file():
            raise CorruptStoreError(folder / DATABASE_FILE, "it is missing")
    return read_commit_record(folder)


def check_database(database: Database, folder: Path) -> tuple[StoreSettings, Commit]:
    """Return settings and last commit of a database that is whole and not older than what was acknowledged.

    To be called inside a snapshot of the database: while it lasts no commit can finish, so that the record is at most
    the one commit behind that a writer is about to acknowledge, or that a crash left unacknowledged.

    Raises:
        CorruptStoreError: If anything is damaged, missing or another store's.
    """
    settings = database.check_structure()
    commit = database.read_commit()
    acknowledged = read_commit_record(folder)
    if settings.store != acknowledged.store:
        raise CorruptStoreError(database.path, f"it is not of the store that {RECORD_FILE} names, or is damaged")
    if commit.number < acknowledged.commit:
        raise CorruptStoreError(
            database.path, f"it ends at commit {commit.number}, but {acknowledged.commit} was acknowledged"
        )
    same = commit.number == acknowledged.commit and commit.chain(settings) == acknowledged.chain
    one_ahead = commit.number == acknowledged.commit + 1 and commit.previous == acknowledged.chain
    if not same and not one_ahead:
        raise CorruptStoreError(
            database.path, f"its content is not what commit {acknowledged.commit} of {RECORD_FILE} names"
        )
    return settings, commit


def built_with(path: str | os.PathLike[str]) -> str:
    """Return the name of the embedder that built a store, as `load_embedder` takes it, or "" where it has none.

    Raises:
        StoreError: If there is no store, or one that cannot be read.
    """
    folder = resolve(path)
    check_folder(folder)
    database = Database(folder, read_only=True, writable=os.access(folder, os.W_OK))
    try:
        return database.settings().embedder
    finally:
        database.close()


def check_embedder(embedder: object) -> None:
    """Refuse what is no embedder.

    Raises:
        InvalidInputError: If it lacks a method or its vectors have no length.
    """
    if not isinstance(embedder, Embedder):
        raise InvalidInputError(
            f"embedder must have dim, fingerprint, embed_queries and embed_documents, but {embedder!r} has not; "
            "get one with load_embedder(name)."
        )
    check_count("embedder.dim", embedder.dim)


def match_embedder(embedder: Embedder, settings: StoreSettings) -> None:
    """Refuse another embedder than the one that built the store.

    Raises:
        EmbedderMismatchError: If fingerprint or length differ.
    """
    built, given = (f"{one.fingerprint} ({one.dim} dimensions)" for one in (settings, embedder))
    if given != built:
        raise EmbedderMismatchError(built, given)


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The state of a store.

    Attributes:
        documents: How many documents were read.
        damaged_ids: Ids of documents whose row or vector is damaged, as far as they can be read.
        problems: One sentence for each thing that is wrong; empty when the store is sound.
    """

    documents: int
    damaged_ids: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_store(path: str | os.PathLike[str]) -> VerifyReport:
    """Check every byte of a store's database, also of one that does not open; nothing is changed.

    Raises:
        StoreNotFoundError: If nothing is there.
        NotAStoreError: If something else is.
        FormatTooNewError: If a newer version wrote it.
    """
    folder = resolve(path)
    try:
        check_folder(folder)
    except CorruptStoreError as exc:
        return VerifyReport(0, (), (str(exc),))
    database = Database(folder, read_only=True, writable=os.access(folder, os.W_OK))
    try:
        with database.snapshot():
            return examine(database, folder, None)
    except CorruptStoreError as exc:
        return VerifyReport(0, (), (str(exc),))
    finally:
        database.close()


def examine(database: Database, folder: Path, index: VectorIndex | None) -> VerifyReport:
    """Return what is wrong with a database and, where given, with the index over it; inside a snapshot."""
    problems: list[str] = []
    try:
        check_database(database, folder)
    except CorruptStoreError as exc:
        problems.append(f"{exc.file.name}: {exc.reason}")
    documents, damaged = database.damaged()
    problems += [reason for _, reason in damaged]
    if index is not None and not damaged:
        problems += _compare(database, index)
    ids = [name for name, _ in damaged if name is not None]
    return VerifyReport(documents, tuple(dict.fromkeys(ids)), tuple(problems))


def _compare(database: Database, index: VectorIndex) -> list[str]:
    rows = database.vector_rows()
    if not np.array_equal(rows, index.rows()):
        return [f"the FAISS index has {len(index)} vectors, not the {len(rows)} of the database"]
    if not np.array_equal(index.vectors(), database.vectors(rows, dim=index.dim)):
        return ["the vectors of the FAISS index are not those of the database"]
    return []
