"""Bringing a store in step with folders: what is new comes in, what changed is replaced, what vanished goes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from qwen_rerank.documents import Skipped
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.converters import read_of_kind
from qwen_rerank.folders.cutting import Passage, cut
from qwen_rerank.folders.kinds import Converted
from qwen_rerank.folders.records import (
    FileRecord,
    Folder,
    Inventory,
    Scope,
    digest,
    folders_of,
    paths_to_record,
    scopes,
    text_key,
    write_folders,
)
from qwen_rerank.folders.walk import Found, shown, walk
from qwen_rerank.folders.worker import ConversionFailedError, Converter
from qwen_rerank.store import FaissStore
from qwen_rerank.types import Document

HEADING_SEPARATOR = " › "
_BATCH = 256  # passages that are embedded and stored together, unless one file has more

Change = Literal["added", "changed", "cut anew", "unchanged", "deleted"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileReport:
    """The outcome of a run for one file.

    Attributes:
        source: The label of its folder and its path below it.
        change: "added", "changed", "cut anew" (the same content under other settings), "unchanged" or "deleted".
        kind: What it was read as; "" where it was not read.
        passages: How many passages the store has of it now.
        notes: What is to be said of it, such as its encoding where that is not UTF-8.
    """

    source: str
    change: Change
    kind: str = ""
    passages: int = 0
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class SyncReport:
    """The outcome of a run.

    Attributes:
        files: Every file that is or was in the store.
        skipped: Every file, folder and row that is not, with the reason.
        embedded: Passages that were embedded.
        reused: Passages that were stored again with the vector that their text already had.
        deleted: Passages that were removed.
        moved: Folders that were found again at another place: label to where it was and is.
        replaced: Labels of folders that lie in one that was named now, and went into it.
        dry_run: Whether nothing was written.
    """

    files: list[FileReport] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    embedded: int = 0
    reused: int = 0
    deleted: int = 0
    moved: dict[str, tuple[str, str]] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    dry_run: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """The number of files that were added, changed, cut anew, unchanged and deleted; none is left out."""
        found = Counter(one.change for one in self.files)
        return {name: found[name] for name in ("added", "changed", "cut anew", "unchanged", "deleted")}

    @property
    def passages(self) -> int:
        """The number of passages that the store has of these files now."""
        return sum(one.passages for one in self.files)


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run: files looked at, of so many, and passages written."""

    files: int
    n_files: int
    passages: int


def sync_folder(
    store: FaissStore,
    paths: Iterable[str | Path],
    *,
    tokens: int | None = None,
    overlap: int | None = None,
    text_column: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    gitignore: bool | None = None,
    hidden: bool | None = None,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> SyncReport:
    """Bring a store in step with folders or files, and say what was done and what was left out.

    A file is cut into passages; each is a document whose id is the folder's name, the file's path below it and a
    number, so that it stays when the folder moves. Only what is new or changed is embedded. What came into the store
    in other ways, or from folders that are not named, is left alone. A run that is cut short is completed by the next.

    Args:
        store: Open for writing.
        paths: Folders or files.
        tokens: Longest passage. As with all settings that follow, None is what the folder was last read with.
        overlap: Tokens that a passage repeats of the one before.
        text_column: Column of tables that is read.
        include: Patterns of files to read, such as `*.md`; a string is one pattern.
        exclude: Patterns of files and folders to leave out.
        gitignore: Whether `.gitignore` files count.
        hidden: Whether names that begin with a dot are read.
        dry_run: Only say what would be done.
        progress: Is told how far the run is.

    Raises:
        InvalidInputError: If a path does not exist or a setting is wrong.
        MissingExtraError: If the package that reads a kind of file is not installed.
    """
    inventory, folders = folders_of(store)
    before = dict(folders)
    given = {
        "tokens": tokens,
        "overlap": overlap,
        "text_column": text_column,
        "include": include,
        "exclude": exclude,
        "gitignore": gitignore,
        "hidden": hidden,
    }
    wanted, replaced = scopes(paths_to_record(paths), folders, inventory, given)
    report = SyncReport(dry_run=dry_run, moved=_moves(before, folders))
    if not dry_run:
        store.delete([])  # a store that cannot be written is an error before its folders are
        # Before any passage, so that a run that is cut short is found again; what is replaced stays until it is.
        write_folders(store.path, {**{label: before[label] for label in replaced}, **folders})
    run = _Run(store, inventory, report, progress)
    for scope in wanted:
        run.read(scope)
    for label in replaced:
        if run.could_read(before[label].path):
            run.forget(label, inventory.files.get(label, {}))
            report.replaced.append(label)
        else:
            folders[label] = before[label]
    run.finish()
    if replaced and not dry_run:
        write_folders(store.path, folders)
    return report


def forget_folder(store: FaissStore, folder: str | Path) -> int:
    """Remove a folder's documents from a store, and return how many those were.

    Args:
        store: Open for writing.
        folder: Its label, or its path.

    Raises:
        InvalidInputError: If the store has no such folder; the message names those that it has.
    """
    inventory, folders = folders_of(store)
    path = Path(folder).expanduser().absolute()
    places = (path, Path(os.path.realpath(path)))
    label = next((one.label for one in folders.values() if one.label == str(folder) or one.path in places), None)
    if label is None:
        known = ", ".join(f"{one.label!r} ({one.path})" for one in folders.values()) or "none"
        raise InvalidInputError(f"{str(folder)!r} is no folder of this store; it has {known}.")
    ids = [one for record in inventory.files.get(label, {}).values() for one in record.ids]
    removed = store.delete(ids).deleted
    del folders[label]
    write_folders(store.path, folders)
    return removed


def _moves(before: dict[str, Folder], after: dict[str, Folder]) -> dict[str, tuple[str, str]]:
    return {
        label: (str(before[label].path or "an unknown place"), str(folder.path))
        for label, folder in after.items()
        if label in before and before[label].path != folder.path
    }


class _Run:
    """One run: reads files, and writes passages in batches of whole files."""

    def __init__(
        self, store: FaissStore, inventory: Inventory, report: SyncReport, progress: Callable[[Progress], None] | None
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._report = report
        self._progress = progress
        self._pending: list[Document] = []
        self._leftover: list[str] = []  # ids of passages that the files in `_pending` have no longer
        self._gone: list[str] = []  # removed at the end, so that a file that was renamed finds its vectors
        self._touched: dict[str, dict[str, Any]] = {}
        self._unread: list[Path] = []  # what could not be looked into now
        self._looked_at = 0

    def read(self, scope: Scope) -> None:
        """Bring one folder, or a part of it, in step."""
        known = self._inventory.files.get(scope.folder.label, {})
        seen: set[str] = set()
        found = list(walk(scope.root, scope.start, scope.folder.settings.selection))
        n_files = self._looked_at + len(found)
        with Converter(text_column=scope.folder.settings.text_column) as converter:
            for one in found:
                if one.reason is not None:
                    self._skip(scope, one.name, one.reason)
                    if one.unknown:
                        # That it cannot be looked into now is no proof that its files vanished.
                        self._unread.append(one.path)
                        seen |= {name for name in known if one.holds(name)}
                elif self._read_file(scope, one, known.get(one.name), converter):
                    seen.add(one.name)
                self._looked_at += 1
                self._say(n_files)
        self.forget(
            scope.folder.label,
            {name: record for name, record in known.items() if name not in seen and scope.covers(name)},
        )

    def could_read(self, folder: Path | None) -> bool:
        """Return whether nothing of a folder was found unreadable so far."""
        return folder is None or not any(
            folder == path or folder in path.parents or path in folder.parents for path in self._unread
        )

    def forget(self, label: str, files: dict[str, FileRecord]) -> None:
        """Note files that are no longer there."""
        for name, record in files.items():
            self._gone += record.ids
            self._report.files.append(FileReport(f"{label}/{name}", "deleted"))

    def finish(self) -> None:
        """Write what is left, and remove what vanished."""
        self._flush()
        self._say(self._looked_at)
        self._report.deleted += len(self._gone)
        if self._report.dry_run:
            return
        if self._gone:
            self._store.delete(self._gone)
        if self._touched:
            self._store.update_metadata(self._touched)

    def _read_file(self, scope: Scope, found: Found, known: FileRecord | None, converter: Converter) -> bool:
        """Bring one file in step; return whether the store has passages of it, be it of before."""
        settings, label = scope.folder.settings, scope.folder.label
        try:
            kind, data = read_of_kind(found.path, links=False)
            modified = datetime.fromtimestamp(found.path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        except InvalidInputError as exc:
            self._skip(scope, found.name, str(exc))
            return False
        except (OSError, OverflowError, ValueError) as exc:
            return self._leave(scope, found, known, f"cannot be read ({exc})")
        if kind is None:
            suffix = found.path.suffix.lower()
            self._skip(scope, found.name, f"no kind that can be read{f' ({suffix})' if suffix else ''}")
            return False
        content = digest(data)
        if known is not None and known.whole(content, settings.key):
            if known.modified != modified:
                self._touched |= {one: {"modified": modified} for one in known.ids}
            self._report.files.append(FileReport(f"{label}/{found.name}", "unchanged", kind.name, len(known.ids)))
            return True
        try:
            converted = converter.convert(found.path, kind, data)
        except (ConversionFailedError, OSError) as exc:
            return self._leave(scope, found, known, str(exc))
        except InvalidInputError as exc:
            self._skip(scope, found.name, str(exc))
            return False
        for row, reason in converted.refused:
            self._skip(scope, f"{found.name}:{row}", reason)
        if converted.n_refused > len(converted.refused):
            self._skip(scope, found.name, f"{converted.n_refused - len(converted.refused)} more rows")
        file = {"suffix": found.path.suffix.lower(), "modified": modified, "digest": content, "cut": settings.key}
        documents = passages_of(label, found.name, cut(converted.sections, settings.cut), file)
        if not documents:
            self._skip(scope, found.name, "it has no text")
            return False
        self._put(documents, known, kind.name, converted)
        return True

    def _leave(self, scope: Scope, found: Found, known: FileRecord | None, reason: str) -> bool:
        """Skip a file that may be read another time, and leave what the store has of it."""
        self._unread.append(found.path)
        kept = "" if known is None else "; the store keeps what it had of it"
        self._skip(scope, found.name, f"{reason.removesuffix('.')}{kept}")
        return known is not None

    def _put(self, documents: list[Document], known: FileRecord | None, kind: str, converted: Converted) -> None:
        source, content = documents[0].metadata["source"], documents[0].metadata["digest"]
        change: Change = "added" if known is None else "cut anew" if known.digest == content else "changed"
        self._report.files.append(FileReport(source, change, kind, len(documents), tuple(converted.notes)))
        self._pending += documents
        if known is not None:
            new = {document.id for document in documents}
            self._leftover += [one for one in known.ids if one not in new]
        if len(self._pending) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        leftover, self._leftover = self._leftover, []
        self._report.deleted += len(leftover)
        if self._report.dry_run:
            self._report.embedded += len(pending)
            return
        if pending:
            self._write(pending)
        if leftover:
            # After the new ones: a run that is cut short here leaves too much, which the next one sees, never too little.
            self._store.delete(leftover)

    def _write(self, documents: list[Document]) -> None:
        """Store passages; a text that is stored already, in a file that was renamed or edited, keeps its vector."""
        places, vectors = self._known_vectors(documents)
        fresh = [document for n, document in enumerate(documents) if n not in places]
        reused = [documents[n] for n in sorted(places)]
        if reused:
            self._store.upsert(reused, vectors=np.stack([vectors[places[n]] for n in sorted(places)]))
        if fresh:
            self._store.upsert(fresh)
        self._report.embedded += len(fresh)
        self._report.reused += len(reused)

    def _known_vectors(self, documents: list[Document]) -> tuple[dict[int, int], np.ndarray]:
        """Return place of a document to row of its vector, and the vectors."""
        texts = self._inventory.texts
        wanted = {n: texts[key] for n, doc in enumerate(documents) if (key := text_key(doc.text)) in texts}
        if not wanted or not self._store.dim:
            return {}, np.empty((0, 0), np.float32)
        ids = list(dict.fromkeys(wanted.values()))
        there = {document.id: document.text for document in self._store.get(ids)}  # as they are by now
        vectors = self._store.vectors_of(ids)
        rows = {one: row for row, one in enumerate(ids)}
        usable = {
            n: rows[one]
            for n, one in wanted.items()
            if there.get(one) == documents[n].text and vectors[rows[one]].any()  # without tokens there is none
        }
        return usable, vectors

    def _skip(self, scope: Scope, name: str, reason: str) -> None:
        self._report.skipped.append(Skipped(f"{scope.folder.label}/{shown(name)}", reason))

    def _say(self, n_files: int) -> None:
        if self._progress is not None:
            self._progress(Progress(self._looked_at, n_files, self._report.embedded + self._report.reused))


def passages_of(label: str, name: str, passages: Sequence[Passage], file: dict[str, Any]) -> list[Document]:
    """Return a file's passages as documents.

    The text begins with the headings above it, unless these are in it. The metadata hold `source`, `folder`, `path`,
    `heading`, `line` and `last_line` or what else tells the place, `part` of `parts`, the file's `suffix`, `modified`
    (UTC) and `digest`; a row's other columns lie beside them.
    """
    documents = []
    for number, passage in enumerate(passages, start=1):
        section = passage.section
        heading = HEADING_SEPARATOR.join(section.heading)
        text = section.text
        if heading and section.heading[-1] not in text[: 2 * len(section.heading[-1]) + 20]:
            text = f"{heading}\n{text}"
        place = {key: value for key, value in section.place.items() if key != "fields"}
        if section.line is not None:
            place |= {"line": section.line, "last_line": passage.last_line}
        ours = {"source": f"{label}/{name}", "folder": label, "path": name, "heading": heading, **place, **file}
        ours |= {"part": number, "parts": len(passages)}
        columns = section.place.get("fields", {})
        metadata = {**{key: value for key, value in columns.items() if key not in ours}, **ours}
        documents.append(Document(f"{label}/{name}#{number}", text, metadata))
    return documents
