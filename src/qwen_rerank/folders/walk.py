"""The files of a folder that are to be read, and the reason of each that is not."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.regular_files import read_regular
from qwen_rerank.store.commits import RECORD_FILE
from qwen_rerank.store.database_file import DATABASE_FILE

_GENERATED = ("__pycache__", "node_modules")
_GITIGNORE_BYTES = 1 << 20
_MOST_CHARS = 4096  # no path has more


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
    """A path below a folder: a file to read, or with a reason why it is not.

    Attributes:
        path: Where it is.
        name: Its path below the folder, with a slash at the end of a folder's; "./" for the folder itself.
        reason: Why it is not read; None for a file to read.
        unknown: Whether nobody can tell now what is there, so that no file there is known to have vanished.
    """

    path: Path
    name: str
    reason: str | None = None
    unknown: bool = False

    def holds(self, name: str) -> bool:
        """Return whether a relative path is this one, or lies below it."""
        own = self.name.removesuffix("/")
        return own == "." or name == own or name.startswith(own + "/")


def walk(root: Path, start: Path, selection: Selection) -> Iterator[Found]:
    """Yield everything below `start`, in the order of names; a folder that is left out counts as one.

    Args:
        root: The folder that names are relative to.
        start: It, or a folder or file below it.
        selection: Which files are wanted.
    """
    if not os.path.isdir(start):
        yield _judge(start, root, selection, [])
        return
    rules = _rules_above(root, start) if selection.gitignore else []
    yield from _below(start, root, selection, rules)


def _below(start: Path, root: Path, selection: Selection, rules: list[tuple[Path, Any]]) -> Iterator[Found]:
    waiting = [(start, rules)]  # the next one last; not by recursion, which ends a thousand folders down
    while waiting:
        path, rules = waiting.pop()
        # Of `os.path`: those of `Path` raise where a folder may not be entered.
        if os.path.islink(path) or not os.path.isdir(path):
            yield _judge(path, root, selection, rules)
            continue
        if path != start and (reason := _reason(path, root, selection, rules, folder=True)):
            yield Found(path, _name(path, root) + "/", reason)
            continue
        if selection.gitignore and os.path.isfile(path / ".gitignore"):
            rules = [*rules, (path, _spec(path / ".gitignore"))]
        try:
            names = sorted(os.listdir(path), reverse=True)
        except OSError as exc:
            yield Found(path, _name(path, root) + "/", f"cannot be read ({exc.strerror})", unknown=True)
            continue
        waiting += [(path / name, rules) for name in names]


def _judge(path: Path, root: Path, selection: Selection, rules: list[tuple[Path, Any]]) -> Found:
    name = _name(path, root)
    try:
        state = os.lstat(path)  # before the rules, which ask other things of a folder than of a file
    except OSError as exc:
        return Found(path, name, f"cannot be read ({exc.strerror})", unknown=True)
    if stat.S_ISDIR(state.st_mode):  # though it was none a moment ago
        return Found(path, name + "/", "cannot be read (a folder that gives no answer)", unknown=True)
    return Found(path, name, _reason(path, root, selection, rules, folder=False) or _unreadable(path, state))


def _reason(
    path: Path, root: Path, selection: Selection, rules: Sequence[tuple[Path, Any]], *, folder: bool
) -> str | None:
    name = _name(path, root)
    if not is_unicode(name):
        return "its name is no Unicode; rename it"
    if not selection.hidden and path.name.startswith("."):
        return "hidden"
    if folder and path.name in _GENERATED:
        return "a folder that programs make"
    if folder and os.path.isfile(path / RECORD_FILE) and os.path.isfile(path / DATABASE_FILE):
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


def _unreadable(path: Path, state: os.stat_result) -> str | None:
    if stat.S_ISLNK(state.st_mode):
        return "a link that leads nowhere" if not os.path.exists(path) else "a link; links are not followed"
    if not stat.S_ISREG(state.st_mode):
        return "no regular file"
    return "the file is empty" if state.st_size == 0 else None


def _rules_above(root: Path, start: Path) -> list[tuple[Path, Any]]:
    above = [root, *reversed([p for p in start.parents if p != root and root in p.parents])] if start != root else []
    return [(folder, _spec(folder / ".gitignore")) for folder in above if os.path.isfile(folder / ".gitignore")]


def _spec(path: Path) -> Any:
    try:
        from pathspec import GitIgnoreSpec, RegexPattern
    except ImportError as exc:
        raise MissingExtraError("--gitignore", package="pathspec", extra="files", cause=exc) from exc
    try:
        lines = read_regular(path, most_bytes=_GITIGNORE_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as exc:
        raise InvalidInputError(f"{path} cannot be read ({exc}); mend it, or leave --gitignore out.") from exc
    for number, line in enumerate(lines, start=1):
        if len(line) > _MOST_CHARS:
            raise InvalidInputError(
                f"{path}:{number} has more than {_MOST_CHARS} characters; write it shorter, or leave --gitignore out."
            )
    try:
        spec = GitIgnoreSpec.from_lines(lines)
    except ValueError as exc:
        raise InvalidInputError(f"{path} holds no rules of git ({exc}); mend it, or leave --gitignore out.") from exc
    for pattern in spec.patterns:
        if isinstance(pattern, RegexPattern) and pattern.regex is not None:
            pattern.regex = re.compile(without_retries(pattern.regex.pattern))
    return spec


_LEADING, _BETWEEN = "^(?:.+/)?", "(?:/.+)?/"  # what `**/` and `/**/` become
_EARLIER_STAR = re.compile(r"\[\^/\]\*((?:\\.|\[\^/\](?!\*)|[^\\/])*?)(?=\[\^/\]\*)", re.DOTALL)


def without_retries(regex: str) -> str:
    """Return a rule's regular expression with the same matches, found in a time that is no power of its stars.

    What stands between two stars is taken where it first fits, and never tried anew further on: the second star takes
    whatever the first would have.
    """
    regex = _EARLIER_STAR.sub(r"(?>[^/]*?\1)", regex)
    first, *others = regex.split(_BETWEEN)
    if others and first.startswith(_LEADING):
        first = f"^(?>(?:.+?/)??{first.removeprefix(_LEADING)}(?=/))"
    middle = [f"(?>(?:/.+?)??/{part}(?=/))" for part in others[:-1]]
    return "".join([first, *middle, *[_BETWEEN + part for part in others[-1:]]])


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def is_unicode(name: str) -> bool:
    """Return whether UTF-8 can carry a name; bytes of another encoding it cannot."""
    return name == name.encode("utf-8", "replace").decode()


def shown(name: str) -> str:
    """Return a name for a message, with the bytes that are no Unicode written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
