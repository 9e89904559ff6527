"""The files of a folder that are to be read, and the reason of each that is not."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwen_rerank.errors import MissingExtraError
from qwen_rerank.store.commits import RECORD_FILE
from qwen_rerank.store.database_file import DATABASE_FILE

_GENERATED = ("__pycache__", "node_modules")


@dataclass(frozen=True, slots=True)
class Selection:
    """Rules for the files of a folder that are wanted.

    Attributes:
        include: Patterns of relative paths or names, such as `*.md` or `docs/*`; empty for all.
        exclude: Patterns of those that are left out.
        gitignore: Whether the `.gitignore` files count.
        hidden: Whether names that begin with a dot are read too.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gitignore: bool = False
    hidden: bool = False

    def refusal(self, name: str) -> str | None:
        """Return why a relative path is not wanted, or None."""
        if self.include and not any(matches_pattern(name, pattern) for pattern in self.include):
            return "not among --include"
        if any(matches_pattern(name, pattern) for pattern in self.exclude):
            return "left out by --exclude"
        return None


def matches_pattern(name: str, pattern: str) -> bool:
    """Return whether a pattern fits a path with slashes, one of the folders above it, or without a slash one of its names."""
    pattern = pattern.removeprefix("./").removesuffix("/")
    parts = name.split("/")
    paths = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if "/" in pattern:
        return any(fnmatchcase(path, pattern) for path in paths)
    return any(fnmatchcase(part, pattern) for part in parts)


@dataclass(frozen=True, slots=True)
class Found:
    """A path below a folder: a file to read, or with a reason why it is not."""

    path: Path
    name: str
    reason: str | None = None


def walk(root: Path, start: Path, selection: Selection) -> Iterator[Found]:
    """Yield everything below `start`, in the order of names; a folder that is left out counts as one.

    Args:
        root: The folder that names are relative to.
        start: It, or a folder or file below it.
        selection: Which files are wanted.
    """
    if not start.is_dir():
        yield _judge(start, root, selection, [])
        return
    rules = _rules_above(root, start) if selection.gitignore else []
    yield from _below(start, root, selection, rules)


def _below(folder: Path, root: Path, selection: Selection, rules: list[tuple[Path, Any]]) -> Iterator[Found]:
    if selection.gitignore and (folder / ".gitignore").is_file():
        rules = [*rules, (folder, _spec(folder / ".gitignore"))]
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as exc:
        yield Found(folder, _name(folder, root) + "/", f"cannot be read ({exc.strerror})")
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            reason = _reason(path, root, selection, rules, folder=True)
            if reason:
                yield Found(path, _name(path, root) + "/", reason)
            else:
                yield from _below(path, root, selection, rules)
        else:
            yield _judge(path, root, selection, rules)


def _judge(path: Path, root: Path, selection: Selection, rules: list[tuple[Path, Any]]) -> Found:
    name = _name(path, root)
    return Found(path, name, _reason(path, root, selection, rules, folder=False) or _unreadable(path))


def _reason(
    path: Path, root: Path, selection: Selection, rules: Sequence[tuple[Path, Any]], *, folder: bool
) -> str | None:
    name = _name(path, root)
    if name != _printable(name):
        return "its name is no Unicode; rename it"
    if not selection.hidden and path.name.startswith("."):
        return "hidden"
    if folder and path.name in _GENERATED:
        return "a folder that programs make"
    if folder and (path / RECORD_FILE).is_file() and (path / DATABASE_FILE).is_file():
        return "a store"  # perhaps the one that is being filled, which would be read for ever anew
    if folder:
        excluded = any(matches_pattern(name, pattern) for pattern in selection.exclude)
        reason = "left out by --exclude" if excluded else None
    else:
        reason = selection.refusal(name)
    if reason:
        return reason
    for base, spec in rules:
        if spec.match_file(path.relative_to(base).as_posix() + ("/" if folder else "")):
            return "ignored by .gitignore"
    return None


def _unreadable(path: Path) -> str | None:
    try:
        state = os.lstat(path)
    except OSError as exc:
        return f"cannot be read ({exc.strerror})"
    if stat.S_ISLNK(state.st_mode):
        return "a link that leads nowhere" if not path.exists() else "a link; links are not followed"
    if not stat.S_ISREG(state.st_mode):
        return "no regular file"
    return "the file is empty" if state.st_size == 0 else None


def _rules_above(root: Path, start: Path) -> list[tuple[Path, Any]]:
    above = [root, *reversed([p for p in start.parents if p != root and root in p.parents])] if start != root else []
    return [(folder, _spec(folder / ".gitignore")) for folder in above if (folder / ".gitignore").is_file()]


def _spec(path: Path) -> Any:
    try:
        from pathspec import GitIgnoreSpec
    except ImportError as exc:
        raise MissingExtraError("--gitignore", package="pathspec", extra="files", cause=exc) from exc
    return GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _printable(name: str) -> str:
    """Return a name as UTF-8 can carry it; bytes of another encoding are replaced."""
    return name.encode("utf-8", "replace").decode()


def shown(name: str) -> str:
    """Return a name for a message, with the bytes that are no Unicode written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
