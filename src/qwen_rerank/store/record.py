"""The commit record: what was acknowledged, kept outside the database.

SQLite cannot tell that its last commits are gone: a database put back to an older state is a valid database. So every
commit is acknowledged only after this small file names it, and `open` compares the two. A crash can leave the record
one commit behind the database (committed, not yet acknowledged), and never ahead of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_rerank.store.errors import CorruptStoreError, FormatTooNewError
from qwen_rerank.store.files import explained, publish, read_plain, write_temporary

FORMAT = 1
NAME = "commit.json"


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """The last acknowledged commit.

    Attributes:
        store: The store's identity, 32 hex digits.
        commit: Number of the commit, from 0 for the empty store.
        chain: Running hash over settings, content and all earlier commits, 64 hex digits.
        format: Format number of the store.
    """

    store: str
    commit: int
    chain: str
    format: int = FORMAT

    def prepare(self, folder: Path) -> Path:
        """Write the record durably under a temporary name, so that only a rename is left once the commit is done."""
        fields = asdict(self)
        data = json.dumps({**fields, "check": _check(fields)}, indent=1).encode()
        with explained(folder / NAME):
            return write_temporary(folder / NAME, data)

    def acknowledge(self, folder: Path, prepared: Path) -> None:
        """Make the prepared record the valid one, durably."""
        with explained(folder / NAME):
            publish(prepared, folder / NAME)


def read_record(folder: Path) -> CommitRecord:
    """Return the folder's commit record.

    Raises:
        CorruptStoreError: If it is missing or damaged.
        FormatTooNewError: If a newer version of this package wrote it.
    """
    path = folder / NAME
    try:
        fields = json.loads(read_plain(path))
        check = fields.pop("check")
        if check != _check(fields):
            raise CorruptStoreError(path, "its checksum does not match")
        found = fields["format"]
    except OSError as exc:
        raise CorruptStoreError(path, f"it cannot be read ({exc.strerror})") from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CorruptStoreError(path, "it is not a commit record") from exc
    if not isinstance(found, int) or found > FORMAT:
        raise FormatTooNewError(folder, found=found, supported=FORMAT)
    return _parsed(path, fields)


def _parsed(path: Path, fields: dict[str, object]) -> CommitRecord:
    store, commit, chain = fields.get("store"), fields.get("commit"), fields.get("chain")
    if (
        set(fields) == {"store", "commit", "chain", "format"}
        and isinstance(store, str)
        and isinstance(chain, str)
        and re.fullmatch("[0-9a-f]{32}", store)
        and re.fullmatch("[0-9a-f]{64}", chain)
        and isinstance(commit, int)
    ):
        return CommitRecord(store=store, commit=commit, chain=chain)
    raise CorruptStoreError(path, "it is not a commit record")


def _check(fields: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
