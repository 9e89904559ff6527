"""The record of a store's folders: where each lies, how it is cut, and what of it is in the store."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qwen_rerank.bounded_json import loads
from qwen_rerank.checks import check_text
from qwen_rerank.documents import write_whole
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.cutting import CutSettings
from qwen_rerank.folders.walk import Selection, is_unicode, shown
from qwen_rerank.regular_files import read_regular
from qwen_rerank.store import FaissStore
from qwen_rerank.types import Document

RECORD = "folders.json"
_MOST_RECORD_BYTES = 1 << 24
CUT = CutSettings()
VERSION = 3  # changes with anything that makes other passages of the same file


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSettings:
    """Settings of the reading of a folder; kept in the store, so that the next run needs no option.

    Attributes:
        tokens: Longest passage.
        overlap: Tokens that a passage repeats of the one before.
        text_column: Column of tables that is read; None for the usual names, else all columns.
        include: Patterns of files that are read; empty for all.
        exclude: Patterns of files and folders that are left out.
        gitignore: Whether `.gitignore` files count.
        hidden: Whether names that begin with a dot are read.
    """

    tokens: int = CUT.tokens
    overlap: int = CUT.overlap
    text_column: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gitignore: bool = False
    hidden: bool = False

    def __post_init__(self) -> None:
        CutSettings(self.tokens, self.overlap)
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if not isinstance(patterns, tuple) or not all(isinstance(one, str) and one for one in patterns):
                raise InvalidInputError(f"{name} must be patterns such as '*.md', not {patterns!r}.")
        for name in ("gitignore", "hidden"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        if self.text_column is not None:
            check_text("text_column", self.text_column)

    @property
    def cut(self) -> CutSettings:
        """The settings of the cutting of its files."""
        return CutSettings(self.tokens, self.overlap)

    @property
    def selection(self) -> Selection:
        """The rules for the files that are read."""
        return Selection(self.include, self.exclude, self.gitignore, self.hidden)

    @property
    def key(self) -> str:
        """A text that changes with anything that makes other passages of a file."""
        column = "" if self.text_column is None else f"/{self.text_column}"
        return f"{VERSION}/{self.tokens}/{self.overlap}{column}"

    def with_given(self, given: Mapping[str, Any]) -> FolderSettings:
        """Return the settings with those that are not None in place of these; one pattern may be a string."""
        wanted = {name: value for name, value in given.items() if value is not None}
        for name in ("include", "exclude"):
            if isinstance(value := wanted.get(name), str):
                wanted[name] = (value,)
            elif isinstance(value, Iterable):
                wanted[name] = tuple(value)
        return replace(self, **wanted)


@dataclass(slots=True)
class FileRecord:
    """The passages of one file that are in the store."""

    digest: str
    key: str
    modified: str
    parts: int
    ids: list[str] = field(default_factory=list)
    mixed: bool = False  # passages of two versions: a run was cut short

    def whole(self, digest: str, key: str) -> bool:
        """Return whether these are all passages of a file with that content, cut in that way."""
        return not self.mixed and (self.digest, self.key) == (digest, key) and len(self.ids) == self.parts


@dataclass(slots=True)
class Inventory:
    """The files of all folders that are in the store.

    Attributes:
        files: Label of a folder to relative path to record.
        texts: A hash of each passage's text to an id that has it, so that it need not be embedded twice.
    """

    files: dict[str, dict[str, FileRecord]] = field(default_factory=dict)
    texts: dict[bytes, str] = field(default_factory=dict)


def take_inventory(documents: Iterable[Document]) -> Inventory:
    """Return the inventory of a store's documents; those that came from no folder are passed over."""
    found = Inventory()
    for document in documents:
        data = document.metadata
        label, name = data.get("folder"), data.get("path")
        content, key, parts = data.get("digest"), data.get("cut"), data.get("parts")
        # Somebody's own documents may have metadata of these names; then their ids are not made of them.
        if not document.id.startswith(f"{label}/{name}#") or not isinstance(label, str) or not isinstance(name, str):
            continue
        if not isinstance(content, str) or not isinstance(key, str) or not isinstance(parts, int):
            continue
        record = FileRecord(content, key, data.get("modified", ""), parts)
        known = found.files.setdefault(label, {}).setdefault(name, record)
        known.ids.append(document.id)
        same = (known.digest, known.key, known.parts, known.modified)
        known.mixed |= same != (record.digest, record.key, record.parts, record.modified)
        found.texts.setdefault(text_key(document.text), document.id)
    return found


def text_key(text: str) -> bytes:
    """Return a hash by which a text is found again."""
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that a store was filled from.

    Attributes:
        label: What its documents' ids begin with; its name, with a number where two have the same.
        path: Where it lay when it was last read; None where nobody knows.
        settings: How it is read.
    """

    label: str
    path: Path | None
    settings: FolderSettings = FolderSettings()


def read_folders(store: Path, inventory: Inventory) -> dict[str, Folder]:
    """Return a store's folders by label; those that only their documents tell of have no path."""
    folders: dict[str, Folder] = {}
    try:
        rows = loads(read_regular(store / RECORD, most_bytes=_MOST_RECORD_BYTES, links=False))
        names = {one.name for one in fields(FolderSettings)}
        for row in rows:
            kept = {name: value for name, value in row["settings"].items() if name in names}
            settings = FolderSettings().with_given(kept)
            folders[row["label"]] = Folder(row["label"], Path(row["path"]) if row["path"] else None, settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        folders = {}  # the documents are the truth; this only saves asking for settings again
    for label in inventory.files:
        folders.setdefault(label, Folder(label, None))
    return folders


def write_folders(store: Path, folders: Mapping[str, Folder]) -> None:
    """Write the record of a store's folders, whole or not at all."""
    rows = [
        {"label": one.label, "path": str(one.path) if one.path else None, "settings": asdict(one.settings)}
        for one in folders.values()
    ]
    write_whole(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", store / RECORD)


@dataclass(frozen=True, slots=True)
class Scope:
    """A part of a folder that a run brings in step: all of it, or what lies at one relative path."""

    folder: Folder
    root: Path
    start: Path

    @property
    def prefix(self) -> str:
        """The relative path, "" for the whole."""
        return "" if self.start == self.root else self.start.relative_to(self.root).as_posix()

    def covers(self, name: str) -> bool:
        """Return whether a relative path is in it."""
        return not self.prefix or name == self.prefix or name.startswith(self.prefix + "/")


def resolve_paths(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return absolute paths of what exists, those inside another left out.

    Raises:
        InvalidInputError: If one does not exist, or there is none.
    """
    found = []
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(given, Iterable):
        raise InvalidInputError(f"paths must be folders or files, not {type(paths).__name__}.")
    for path in given:
        if not isinstance(path, str | os.PathLike):
            raise InvalidInputError(f"paths must be folders or files; {path!r} is neither.")
        resolved = Path(os.path.realpath(Path(path).expanduser()))
        try:
            mode = resolved.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise InvalidInputError(f"{str(path)!r} does not exist; give a folder or a file.") from exc
        except (OSError, ValueError) as exc:
            raise InvalidInputError(f"{str(path)!r} cannot be read ({exc}); give a folder or a file that can.") from exc
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise InvalidInputError(f"{str(path)!r} is neither a folder nor a regular file.")
        found.append(resolved)
    if not found:
        raise InvalidInputError("paths is empty; give at least one folder or file.")
    return [one for one in dict.fromkeys(found) if not any(other in one.parents for other in found)]


def paths_to_record(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return absolute paths as `resolve_paths` does, of which a store can keep the names.

    Raises:
        InvalidInputError: If one does not exist, or a name in it is no Unicode.
    """
    found = resolve_paths(paths)
    for path in found:
        for one in (path, *path.parents):
            if not is_unicode(one.name):
                raise InvalidInputError(f"{shown(str(one))} cannot be indexed: its name is no Unicode; rename it.")
    return found


def scopes(
    paths: Iterable[Path], folders: dict[str, Folder], inventory: Inventory, given: Mapping[str, Any]
) -> tuple[list[Scope], list[str]]:
    """Return what is to be brought in step, with `folders` brought up to date, and labels that a wider folder replaces."""
    found, replaced = [], []
    for path in paths:
        known = next(
            (one for one in folders.values() if one.path and (one.path == path or one.path in path.parents)), None
        )
        root = known.path if known is not None and known.path else path if path.is_dir() else path.parent
        if known is None:
            known = _moved(root, folders, inventory) or Folder(_new_label(root, folders), root)
        for inner in [one for one in folders.values() if one.path and root in one.path.parents]:
            replaced.append(inner.label)
            del folders[inner.label]
        folder = Folder(known.label, root, known.settings.with_given(given))
        folders[folder.label] = folder
        found.append(Scope(folder, root, path))
    return found, replaced


def _new_label(root: Path, folders: Mapping[str, Folder]) -> str:
    name = check_text("the folder's name", root.name or "root")
    return next(label for label in _numbered(name) if label not in folders)


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _moved(root: Path, folders: Mapping[str, Folder], inventory: Inventory) -> Folder | None:
    """Return the folder whose place is gone and half of whose files lie, unchanged, below `root`."""
    for folder in folders.values():
        files = inventory.files.get(folder.label, {})
        if not files or (folder.path is not None and not _is_gone(folder.path)):
            continue
        same = sum(_digest_of(root / name) == record.digest for name, record in files.items())
        if same * 2 >= len(files):
            return folder
    return None


def _is_gone(path: Path) -> bool:
    """Return whether a path is known not to exist; one that cannot be looked at may come back."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _digest_of(path: Path) -> str | None:
    try:
        return digest(read_regular(path, links=False))
    except OSError:
        return None


def digest(data: bytes) -> str:
    """Return the hash that tells whether a file has changed."""
    return hashlib.sha256(data).hexdigest()[:32]


def folders_of(store: FaissStore) -> tuple[Inventory, dict[str, Folder]]:
    """Return what an open store holds of its folders, and the folders."""
    inventory = take_inventory(store)
    return inventory, read_folders(store.path, inventory)
