"""The folder of a store: making it, checking that what is in it is a sound store, and saying what is damaged."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_rerank.checks import check_count
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import Embedder
from qwen_rerank.store.access import LOCK_FILE, WriterLock
from qwen_rerank.store.commits import RECORD_FILE, Commit, CommitRecord, StoreSettings, read_commit_record
from qwen_rerank.store.database import Database
from qwen_rerank.store.database_file import DATABASE_FILE, FOREIGN_FILES, JOURNAL_FILE
from qwen_rerank.store.errors import (
    CorruptStoreError,
    EmbedderMismatchError,
    NotAStoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from qwen_rerank.store.files import TEMPORARY, check_regular, explained, sync_file, sync_folder
from qwen_rerank.store.index import VectorIndex
from qwen_rerank.store.index_file import KINDS, VECTORS, WORDS
from qwen_rerank.store.seal import SEAL_FILE, read_seal
from qwen_rerank.words import WordIndex

_CHUNK = 20_000  # texts read from the database at a time
_SEAL_TRIES = 10
_SEAL_WAIT_S = 0.01
_MAKING = re.compile(r"\.[0-9a-f]{16}\.making")


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a store's folder."""
    try:
        text = os.fspath(path)
        if not isinstance(text, str) or not text:
            raise ValueError("it is no text")
        return Path(os.path.realpath(text))
    except (TypeError, ValueError) as exc:
        raise InvalidInputError(f"path must be the path of a folder, not {path!r}: {exc}.") from exc


def make_store(folder: Path, settings: StoreSettings) -> None:
    """Make an empty store; it is there as a whole or not at all.

    Raises:
        StoreExistsError: If something is at that path already, other than an empty folder.
    """
    first = Commit(number=0, next_row=1, previous="", content=0, documents=0, without_vector=0)
    with _making(folder) as making:
        _fill(making, settings, first)


def copy_store(database: Database, source: Path, target: Path) -> None:
    """Copy a store to a new folder, whole or not at all; to be called inside a snapshot of its database.

    While the snapshot lasts no commit can finish, so that the commit record is that of the database, or one behind.

    Raises:
        StoreExistsError: If something is at `target` already, other than an empty folder.
    """
    with _making(target) as making:
        database.copy_to(making / DATABASE_FILE)
        sync_file(making / DATABASE_FILE)
        for name in (RECORD_FILE, *database.index_files()):
            if (source / name).is_file() and not (source / name).is_symlink():
                shutil.copyfile(source / name, making / name)
                sync_file(making / name)


@contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """Give a place for the files of a new store, and move them into `folder` at the end.

    The folder may be the mount point of an empty volume, so it cannot be renamed into its place as a whole. The commit
    record comes last: a folder without one, beside what a crash left of the making, counts as empty.
    """
    with explained(folder):
        existed = folder.exists()
        if not holds_nothing(folder):
            raise StoreExistsError(f"{folder} is there already; open it with FaissStore.open, or choose another path.")
        folder.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(folder)  # two that make a store of the same empty folder must not mix their files
        try:
            if not holds_nothing(folder):
                raise StoreExistsError(f"{folder} was made by somebody else meanwhile; open it with FaissStore.open.")
            try:
                remove_store(folder, keep_folder=True)
                making = folder / f".{secrets.token_hex(8)}.making"
                making.mkdir()
                yield making
                for name in sorted(os.listdir(making), key=lambda name: name == RECORD_FILE):
                    sync_folder(folder)  # what came before is in its place before the record is
                    os.rename(making / name, folder / name)
                making.rmdir()
                sync_folder(folder)
                sync_folder(folder.parent)
            except BaseException:
                remove_store(folder, keep_folder=existed)
                raise
        finally:
            lock.release()


def remove_store(folder: Path, *, keep_folder: bool) -> None:
    """Remove the files of a store that nobody was given, or of an unfinished one; never raises."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _MAKING.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif (
                path.name in (DATABASE_FILE, JOURNAL_FILE, RECORD_FILE, SEAL_FILE)
                or _is_index(path.name)
                or (path.name == LOCK_FILE and not keep_folder)
            ):
                path.unlink(missing_ok=True)
        if not keep_folder:
            folder.rmdir()


def holds_nothing(folder: Path) -> bool:
    """Return whether a store can be made at a path: nothing is there, or an empty folder, or an unfinished store."""
    with explained(folder):
        if not folder.exists():
            return True
        if not folder.is_dir():
            return False
        names = {path.name for path in folder.iterdir()} - {LOCK_FILE, "lost+found"}
    making = {name for name in names if _MAKING.fullmatch(name)}
    rest = names - making
    unfinished = making and RECORD_FILE not in rest and all(n == DATABASE_FILE or _is_index(n) for n in rest)
    return not rest or bool(unfinished)


def _is_index(name: str) -> bool:
    return any(kind.file.fullmatch(name.removesuffix(TEMPORARY)) for kind in KINDS)


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
        if holds_nothing(folder):
            raise StoreNotFoundError(
                f"No store is at {folder}; make one with FaissStore.create or `qwen-rerank index`."
            )
        if not folder.is_dir() or not any((folder / name).exists() for name in (DATABASE_FILE, RECORD_FILE)):
            raise NotAStoreError(f"{folder} is not a store; make one with FaissStore.create at another path.")
        for name in (DATABASE_FILE, JOURNAL_FILE, *FOREIGN_FILES, RECORD_FILE, SEAL_FILE, LOCK_FILE):
            try:
                check_regular(folder / name)
            except OSError as exc:
                raise CorruptStoreError(folder / name, f"it cannot be read ({exc.strerror})") from exc
        if not (folder / DATABASE_FILE).is_file():
            raise CorruptStoreError(folder / DATABASE_FILE, "it is missing")
    return read_commit_record(folder)


def check_opening(database: Database, folder: Path, *, keep_pages: bool) -> tuple[StoreSettings, Commit]:
    """Return what `check_database` returns; where the seal fits the database file, without reading every row.

    To be called inside a snapshot of the database.

    Args:
        database: The database.
        folder: The store's folder.
        keep_pages: Whether the digests of the pages are needed later, as a writer needs them.

    Raises:
        CorruptStoreError: If anything is damaged, missing or another store's.
    """
    database.settle()
    acknowledged, seal = read_commit_record(folder), read_seal(folder)
    fits = seal is not None and seal.names(acknowledged)
    if fits or keep_pages:
        # Before the rows are checked: what changes in between must not get a seal.
        database.pages.read()
    if seal is not None and fits and database.pages.total() == seal.pages:
        settings = database.check_schema()
        commit = database.sealed_commit(seal)
        # The chain binds settings, counts and content, so the seal's word for them is not needed.
        if commit.record(settings) == acknowledged:
            return settings, commit
    return check_database(database, folder)


def await_seal(database: Database, folder: Path) -> None:
    """Wait a moment if a writer is between a commit and its seal."""
    for _ in range(_SEAL_TRIES):
        with database.snapshot():
            database.check_schema()
            number = database.number()
            acknowledged, seal = read_commit_record(folder), read_seal(folder)
        # More than one commit behind is a seal that nobody is about to renew.
        if seal is None or seal.names(acknowledged) or not number - 1 <= seal.commit <= number:
            return
        time.sleep(_SEAL_WAIT_S)


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
    return settings_of(resolve(path)).embedder


def settings_of(folder: Path) -> StoreSettings:
    """Return the settings of a store that nobody has opened here.

    Raises:
        StoreError: If there is no store, or one that cannot be read.
    """
    check_folder(folder)
    database = Database(folder, read_only=True, writable=os.access(folder, os.W_OK))
    try:
        return database.settings()
    finally:
        database.close()


def check_embedder(embedder: object) -> None:
    """Refuse what is neither an embedder nor None.

    Raises:
        InvalidInputError: If it lacks a method or its vectors have no length.
    """
    if embedder is None:
        return
    if not isinstance(embedder, Embedder):
        raise InvalidInputError(
            f"embedder must have dim, fingerprint, embed_queries and embed_documents, but {embedder!r} has not; "
            "get one with load_embedder(name), or give None to search by words alone."
        )
    check_count("embedder.dim", embedder.dim)


def match_embedder(embedder: Embedder | None, settings: StoreSettings) -> None:
    """Refuse another embedder than the one that built the store; None goes with every store.

    Raises:
        EmbedderMismatchError: If fingerprint or length differ.
    """
    if embedder is None:
        return
    built, given = (f"{one.fingerprint} ({one.dim} dimensions)" for one in (settings, embedder))
    if not settings.dim:
        raise EmbedderMismatchError("none (words alone)", given)
    if given != built:
        raise EmbedderMismatchError(built, given)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """Counts, settings and sizes of a store.

    Attributes:
        documents: How many there are.
        without_vector: How many of them have no vector.
        commits: How many commits there were.
        embedder: Name of the embedder, or "".
        fingerprint: Its fingerprint, or "" for a store of words alone.
        dim: Length of a vector; 0 for a store of words alone.
        metric: "cosine" or "ip".
        index: FAISS factory string.
        words: Whether texts are found by their words.
        indexed_fields: Metadata fields that have an index.
        file_bytes: Size of each file.
    """

    documents: int
    without_vector: int
    commits: int
    embedder: str
    fingerprint: str
    dim: int
    metric: str
    index: str
    words: bool
    indexed_fields: tuple[str, ...]
    file_bytes: Mapping[str, int]


def statistics(database: Database, folder: Path, settings: StoreSettings) -> StoreStatistics:
    """Return the statistics of an open store; to be called inside a snapshot of its database."""
    kept = {name: getattr(settings, name) for name in StoreStatistics.__slots__ if hasattr(settings, name)}
    with explained(folder):
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return StoreStatistics(
        **kept,
        documents=database.count(),
        without_vector=database.count("vector_digest IS NULL"),
        commits=database.number(),
        file_bytes=sizes,
    )


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
        database = Database(folder, read_only=True, writable=os.access(folder, os.W_OK))
        with closing(database), database.snapshot():
            return examine(database, folder)
    except CorruptStoreError as exc:
        return VerifyReport(0, (), (str(exc),))


def examine(
    database: Database, folder: Path, index: VectorIndex | None = None, words: WordIndex | None = None
) -> VerifyReport:
    """Return what is wrong with a database and, where given, with the indexes over it; inside a snapshot."""
    problems: list[str] = []
    try:
        check_database(database, folder)
    except CorruptStoreError as exc:
        problems.append(f"{exc.file.name}: {exc.reason}")
    documents, damaged = database.damaged()
    problems += [reason for _, reason in damaged]
    if index is not None and not damaged:
        problems += _compare(database, index)
    if words is not None and not damaged:
        problems += _compare_words(database, words)
    ids = [name for name, _ in damaged if name is not None]
    return VerifyReport(documents, tuple(dict.fromkeys(ids)), tuple(problems))


def _compare(database: Database, index: VectorIndex) -> list[str]:
    rows = database.matching_rows(VECTORS.condition)
    if not np.array_equal(rows, index.rows()):
        return [f"the FAISS index has {len(index)} vectors, not the {len(rows)} of the database"]
    if index.lossless and not np.array_equal(index.vectors(), database.vectors(rows)):
        return ["the vectors of the FAISS index are not those of the database"]
    return []


def _compare_words(database: Database, words: WordIndex) -> list[str]:
    expected = WordIndex()
    rows = database.matching_rows(WORDS.condition)
    for start in range(0, len(rows), _CHUNK):
        expected.add(rows[start : start + _CHUNK], database.texts(rows[start : start + _CHUNK]))
    return [] if words.same_as(expected) else ["the words index is not that of the documents' texts"]
