"""The SQLite database of a store: documents, metadata and vectors, checked whenever they are opened."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qwen_rerank.bounded_json import loads
from qwen_rerank.store.commits import MODULUS, Change, Commit, StoreSettings
from qwen_rerank.store.database_file import DatabaseFile
from qwen_rerank.store.errors import CorruptStoreError
from qwen_rerank.store.filter_sql import INDEX_PATTERN, field_index
from qwen_rerank.store.rows import Row, row_digest, vector_digest
from qwen_rerank.store.seal import Seal

_SCHEMA = (
    "CREATE TABLE state (settings TEXT NOT NULL, number INTEGER NOT NULL, next_row INTEGER NOT NULL, previous TEXT NOT NULL)",
    "CREATE TABLE index_file (name TEXT NOT NULL, sha256 TEXT NOT NULL)",
    "CREATE TABLE documents (row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, text TEXT NOT NULL, "
    "metadata TEXT NOT NULL, vector_digest BLOB, digest BLOB NOT NULL)",
    "CREATE TABLE vectors (row INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
)
_ROW = "row, id, text, metadata, vector_digest, digest"
_IDS_AT_ONCE = 500  # below SQLite's limit on parameters


class Database(DatabaseFile):
    """The database of one store: its settings, its commits and its rows."""

    # Reading

    def settings(self) -> StoreSettings:
        """Return the settings of the last commit.

        Raises:
            CorruptStoreError: If it is not there or is not what was written.
        """
        return self._decoded(self._all("SELECT settings FROM state"))

    def _decoded(self, rows: Sequence[tuple[Any, ...]]) -> StoreSettings:
        try:
            ((encoded,),) = rows
            settings = StoreSettings.decoded(loads(encoded))
        except (ValueError, TypeError, RecursionError) as exc:
            raise CorruptStoreError(self.path, "its settings cannot be read") from exc
        return settings

    def number(self) -> int:
        """Return the number of the last commit."""
        rows = self._all("SELECT number FROM state")
        if len(rows) != 1 or not isinstance(rows[0][0], int):
            raise CorruptStoreError(self.path, "its state is not what was written")
        return rows[0][0]

    def check_schema(self) -> StoreSettings:
        """Check that tables and indexes are those of a store, and return the settings.

        Raises:
            CorruptStoreError: If anything is not as it was written.
        """
        # Tables first, and nothing but known indexes besides: a hostile view or trigger must not come to run.
        found = {sql.decode() for (sql,) in self._all("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        indexes = found - set(_SCHEMA)
        if not found.issuperset(_SCHEMA) or not all(map(INDEX_PATTERN.fullmatch, indexes)):
            raise CorruptStoreError(self.path, "its tables are not those of a store")
        settings = self.settings()
        if indexes != {field_index(n, field) for n, field in enumerate(settings.indexed_fields)}:
            raise CorruptStoreError(self.path, "its indexes are not those of its declared fields")
        return settings

    def check_structure(self) -> StoreSettings:
        """Check schema, pages and indexes, and return the settings.

        Raises:
            CorruptStoreError: If anything is not as it was written.
        """
        settings = self.check_schema()
        report = self._all("PRAGMA integrity_check(3)")
        if report != [(b"ok",)]:
            raise CorruptStoreError(self.path, "; ".join(line.decode(errors="replace") for (line,) in report))
        return settings

    def read_commit(self) -> Commit:
        """Return the last commit, counted and summed up from every row, each checked against its digest.

        Raises:
            CorruptStoreError: If a row is damaged.
        """
        number, next_row, previous = self._state()
        content = documents = without_vector = 0
        # Every row of the store passes here whenever it is opened, so its digest is computed once and nothing is built.
        with self.explained():
            for *fields, digest in self._connection.execute(f"SELECT {_ROW} FROM documents ORDER BY row"):
                if row_digest(*fields) != digest:
                    raise CorruptStoreError(self.path, f"row {fields[0]} does not match its digest")
                content += int.from_bytes(digest)
                documents += 1
                without_vector += fields[4] is None
        return Commit(
            number=number,
            next_row=next_row,
            previous=previous,
            content=content % MODULUS,
            documents=documents,
            without_vector=without_vector,
        )

    def sealed_commit(self, seal: Seal) -> Commit:
        """Return the last commit with the sums that a seal has of its rows, which are not read.

        Raises:
            CorruptStoreError: If the state is not what was written.
        """
        number, next_row, previous = self._state()
        return Commit(
            number=number,
            next_row=next_row,
            previous=previous,
            content=int(seal.content, 16),
            documents=seal.documents,
            without_vector=seal.without_vector,
        )

    def _state(self) -> tuple[int, int, str]:
        rows = self._all("SELECT number, next_row, previous FROM state")
        if len(rows) != 1:
            raise CorruptStoreError(self.path, f"it has {len(rows)} states, not 1")
        number, next_row, previous = rows[0]
        if not (isinstance(number, int) and isinstance(next_row, int) and isinstance(previous, bytes)):
            raise CorruptStoreError(self.path, "its state is not what was written")
        return number, next_row, previous.decode(errors="replace")

    def rows(self, numbers: Iterable[int], *, locked: bool = True) -> dict[int, Row]:
        """Return these rows by number, each checked against its digest; unknown numbers are left out.

        Args:
            numbers: Row numbers.
            locked: Whether a snapshot is held. Without one, rows that a writer is removing may be missing or look damaged;
                one that is found is right: a row never changes, and its digest covers its number.
        """
        wanted = json.dumps([int(number) for number in numbers])
        query = f"SELECT {_ROW} FROM documents WHERE row IN (SELECT value FROM json_each(?))"
        with self._reader(locked=locked) as connection:
            return {row.number: row for row in self._rows(query, (wanted,), connection)}

    def rows_after(self, number: int, *, limit: int = 1000) -> list[Row]:
        """Return the next rows above a number, ascending, each checked against its digest."""
        query = f"SELECT {_ROW} FROM documents WHERE row > ? ORDER BY row LIMIT ?"
        return list(self._rows(query, (number, limit)))

    def rows_of(self, ids: Sequence[str]) -> dict[str, Row]:
        """Return the rows of these ids; unknown ids are left out."""
        found: dict[bytes, Row] = {}
        for start in range(0, len(ids), _IDS_AT_ONCE):
            part = ids[start : start + _IDS_AT_ONCE]
            marks = ", ".join("?" * len(part))
            found.update(
                (row.id, row) for row in self._rows(f"SELECT {_ROW} FROM documents WHERE id IN ({marks})", part)
            )
        encoded = {one: one.encode() for one in ids}
        return {one: found[name] for one, name in encoded.items() if name in found}

    def known(self, ids: Sequence[str], *, documents: int) -> list[str]:
        """Return those of these ids that are there, out of so many documents."""
        if len(ids) <= documents:
            return list(self.rows_of(ids))
        # A large batch into a small store: reading all ids once is cheaper than asking for each.
        there = {one.decode() for (one,) in self._all("SELECT id FROM documents")}
        return [one for one in ids if one in there]

    def matching_rows(self, condition: str, parameters: Sequence[Any] = ()) -> np.ndarray:
        """Return the numbers of all rows under an SQL condition, int64, ascending."""
        # Sorted here: SQLite would read the documents in order rather than an index of the condition's fields.
        return np.sort(self._numbers(condition, parameters))

    def matching_mask(self, condition: str, parameters: Sequence[Any] = ()) -> np.ndarray:
        """Return for each row number that was ever given, and 0, whether that row is under an SQL condition, bool."""
        mask = np.zeros(self._state()[1], dtype=bool)
        mask[self._numbers(condition, parameters)] = True
        return mask

    def ids(self, condition: str, parameters: Sequence[Any]) -> list[str]:
        """Return the ids of all rows under an SQL condition, in the order of their numbers."""
        query = f"SELECT id FROM documents WHERE {condition} ORDER BY row"
        with self.explained():
            return [one.decode() for (one,) in self._connection.execute(query, parameters)]

    def texts(self, numbers: np.ndarray) -> list[str]:
        """Return the texts of these ascending rows, each row checked against its digest."""
        found = self.rows(numbers)
        return [found[number].text.decode() for number in numbers.tolist()]

    def vectors(self, numbers: np.ndarray, *, locked: bool = True) -> np.ndarray:
        """Return the vectors of these ascending rows, float32 `(n, dim)`, each checked against its digest.

        Args:
            numbers: Row numbers.
            locked: As for `rows`.

        Raises:
            CorruptStoreError: If one is missing or damaged.
        """
        with self._reader(locked=locked) as connection:
            return self._vectors(numbers, connection)

    def _vectors(self, numbers: np.ndarray, connection: sqlite3.Connection) -> np.ndarray:
        settings = self._decoded(connection.execute("SELECT settings FROM state").fetchall())
        dim, kind = settings.dim, np.dtype(settings.vector_kind)
        wanted = json.dumps(numbers.tolist())
        query = (
            "SELECT row, vector, documents.vector_digest FROM documents JOIN vectors USING (row) "
            "WHERE row IN (SELECT value FROM json_each(?)) ORDER BY row"
        )
        with self.explained():
            found = connection.execute(query, (wanted,)).fetchall()
        for row, vector, digest in found:
            if len(vector) != kind.itemsize * dim or vector_digest(vector) != digest:
                raise CorruptStoreError(self.path, f"the vector of row {row} does not match its digest")
        if len(found) != len(numbers):
            raise CorruptStoreError(self.path, f"{len(numbers) - len(found)} vectors are missing")
        joined = np.frombuffer(b"".join(vector for _, vector, _ in found), dtype=kind)
        return joined.reshape(len(found), dim).astype(np.float32)

    def last_row(self, condition: str) -> int:
        """Return the highest row number under an SQL condition; 0 where there is none."""
        rows = self._all(f"SELECT row FROM documents WHERE {condition} ORDER BY row DESC LIMIT 1")
        return int(rows[0][0]) if rows else 0

    def index_files(self) -> dict[str, str]:
        """Return name and SHA-256 of the index files that belong to this database."""
        rows = self._all("SELECT name, sha256 FROM index_file")
        return {name.decode(errors="replace"): digest.decode(errors="replace") for name, digest in rows}

    def count(self, condition: str = "1") -> int:
        """Return how many documents there are under an SQL condition."""
        return int(self._all(f"SELECT count(*) FROM documents WHERE {condition}")[0][0])

    def damaged(self) -> tuple[int, list[tuple[str | None, str]]]:
        """Return how many documents could be read, and id (where it can be told) and reason for each damaged one."""
        query = f"SELECT {_ROW}, (SELECT vector FROM vectors WHERE row = documents.row) FROM documents ORDER BY row"
        found: list[tuple[str | None, str]] = []
        count = 0
        try:
            for *fields, digest, vector in self._connection.execute(query):
                count += 1
                name = fields[1].decode(errors="replace") if isinstance(fields[1], bytes) else None
                if not _sound(Row(*fields), digest):
                    found.append((name, f"row {fields[0]} (id {name!r}) does not match its digest"))
                elif fields[4] is not None and (vector is None or vector_digest(vector) != fields[4]):
                    found.append((name, f"the vector of row {fields[0]} (id {name!r}) is missing or damaged"))
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            found.append((None, f"reading stopped after {count} documents: {exc}"))
        return count, found

    # Writing

    def create(self, settings: StoreSettings, first: Commit) -> None:
        """Make the tables of an empty store."""
        with self.transaction():
            for statement in _SCHEMA:
                self._connection.execute(statement)
            self._make_indexes(settings, start=0)
            values = (json.dumps(settings.encoded()), first.number, first.next_row, first.previous)
            self._connection.execute("INSERT INTO state VALUES (?, ?, ?, ?)", values)

    def write(self, change: Change, commit: Commit) -> None:
        """Write a change and the state that it leads to; to be called inside `transaction`."""
        # What goes goes first: an upsert removes and adds the same id, which is unique.
        gone = [(row.number,) for row in change.removed]
        self._connection.executemany("DELETE FROM documents WHERE row = ?", gone)
        self._connection.executemany("DELETE FROM vectors WHERE row = ?", gone)
        self._connection.executemany(
            "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)",
            (
                (row.number, row.id.decode(), row.text.decode(), row.metadata.decode(), row.vector_digest, row.digest())
                for row in change.added
            ),
        )
        self._connection.executemany("INSERT INTO vectors VALUES (?, ?)", change.vectors)
        values = (commit.number, commit.next_row, commit.previous)
        self._connection.execute("UPDATE state SET number = ?, next_row = ?, previous = ?", values)

    def change_settings(self, before: StoreSettings, after: StoreSettings) -> None:
        """Write new settings and make the indexes that they declare; to be called inside `transaction`."""
        self._connection.execute("UPDATE state SET settings = ?", (json.dumps(after.encoded()),))
        self._make_indexes(after, start=len(before.indexed_fields))

    def _make_indexes(self, settings: StoreSettings, *, start: int) -> None:
        for number, field in enumerate(settings.indexed_fields[start:], start=start):
            self._connection.execute(field_index(number, field))

    def bind_index_file(self, name: str, sha256: str, *, instead_of: Sequence[str]) -> None:
        """Declare that an index file belongs to this database, in place of others."""
        with self.transaction():
            self._connection.executemany("DELETE FROM index_file WHERE name = ?", [(one,) for one in instead_of])
            self._connection.execute("INSERT INTO index_file VALUES (?, ?)", (name, sha256))

    def _rows(
        self, query: str, parameters: Sequence[Any] = (), connection: sqlite3.Connection | None = None
    ) -> Iterator[Row]:
        with self.explained():
            for *fields, digest in (connection or self._connection).execute(query, parameters):
                row = Row(*fields)
                if not _sound(row, digest):
                    raise CorruptStoreError(self.path, f"row {row.number} does not match its digest")
                yield row

    def _numbers(self, condition: str, parameters: Sequence[Any]) -> np.ndarray:
        # As one text: a million rows one by one take four times as long.
        ((joined,),) = self._all(f"SELECT group_concat(row) FROM documents WHERE {condition}", parameters)
        return np.fromstring(joined or b"", dtype=np.int64, sep=",")


def _sound(row: Row, digest: object) -> bool:
    return row_digest(row.number, row.id, row.text, row.metadata, row.vector_digest) == digest
