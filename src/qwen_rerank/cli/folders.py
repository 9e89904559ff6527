"""Commands of `qwen-rerank` that keep a store in step with folders: index, status."""

from __future__ import annotations

import shlex
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwen_rerank.folders import Progress, SyncReport
    from qwen_rerank.store import FaissStore

_LINES = 20  # files that are listed without --verbose
_WATCH_S = 2.0


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(index)
    app.command()(status)


def index(
    source: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders or files: text, Markdown, code, HTML, PDF, Word, slides, sheets, tables, books."),
    ] = None,
    *,
    store: options.StoreOption,
    embedder: Annotated[
        str | None,
        typer.Option(
            "--embedder",
            "-e",
            help=f"The one that the store was built with; for a new store {options.DEFAULT_EMBEDDER}.",
        ),
    ] = None,
    index_kind: Annotated[str, typer.Option("--index", help="auto, or a FAISS factory string.")] = "auto",
    tokens: Annotated[int | None, typer.Option("--tokens", help="Longest passage; 300 for a new folder.")] = None,
    overlap: Annotated[
        int | None,
        typer.Option("--overlap", help="Tokens that a passage repeats of the one before; 30 for a new folder."),
    ] = None,
    text_column: options.TextColumn = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Only these, such as '*.md'.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Not these, such as 'drafts/*'.")] = None,
    gitignore: Annotated[
        bool | None, typer.Option("--gitignore/--no-gitignore", help="Leave out what .gitignore files name.")
    ] = None,
    hidden: Annotated[
        bool | None, typer.Option("--hidden/--no-hidden", help="Read names that begin with a dot.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and index again whenever a file changes.")] = False,
    remove: Annotated[
        str | None,
        typer.Option("--remove", help="Take a folder, by name or path, out of the store; nothing else is done."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every file.")] = False,
) -> None:
    """Bring a store in step with folders: add what is new, replace what changed, remove what vanished.

    What a folder was last indexed with is remembered; only what is given anew changes.
    """
    from qwen_rerank.cli.show import counted, errors
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.folders import forget_folder, sync_folder
    from qwen_rerank.folders.records import paths_to_record
    from qwen_rerank.models.names import SHIPPED
    from qwen_rerank.store.opening import built_with, holds_nothing

    is_new = holds_nothing(store)
    if remove is not None:
        with _opened(store, embedder, index_kind, is_new=False) as opened:
            errors.print(f"{counted(forget_folder(opened, remove), 'passage')} removed.", highlight=False)
        return
    if not source:
        raise InvalidInputError("no folder was named; give at least one folder or file to index.")
    paths_to_record(source)  # before a store is made, which a misspelt folder would leave behind, empty
    settings: dict[str, Any] = {
        "tokens": tokens,
        "overlap": overlap,
        "text_column": text_column,
        "include": include or None,
        "exclude": exclude or None,
        "gitignore": gitignore,
        "hidden": hidden,
    }
    with _opened(store, embedder, index_kind, is_new=is_new, scratch=is_new and dry_run) as opened:
        seen = _state(source, opened.path)  # before the run: what changes meanwhile is seen by the next look
        with _bar() as progress:
            report = sync_folder(opened, source, **settings, dry_run=dry_run, progress=progress)
        _print_report(report, verbose=verbose)
        if watch and not dry_run:
            _watch(opened, source, seen)
        n_documents = len(opened)
    if not n_documents and not dry_run and is_new:
        _discard(store)
        raise InvalidInputError(
            f"no document found in {', '.join(map(str, source))}; what was left out is listed above."
        )
    if not dry_run:
        errors.print(f"{store} now holds {counted(n_documents, 'passage')}. Next:", highlight=False)
        # With a shipped embedder the shipped reranker too: the default would go to the model hub.
        own = f" --model {name}" if (name := built_with(store)) in SHIPPED else ""
        errors.print(
            f'  qwen-rerank search {shlex.quote(str(store))} "your question"{own}', highlight=False, markup=False
        )


def status(
    store: options.StoreArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a store holds: its folders, how each is read, files and passages, and the embedder."""
    from qwen_rerank.cli.show import console, counted, json_line
    from qwen_rerank.folders.records import folders_of
    from qwen_rerank.store import FaissStore

    with FaissStore.open(store, None, read_only=True) as opened:
        inventory, folders = folders_of(opened)
        facts = opened.statistics()
    rows: list[dict[str, Any]] = [
        {
            "folder": one.label,
            "path": str(one.path) if one.path else None,
            "there": bool(one.path and one.path.is_dir()),
            "files": len(inventory.files.get(one.label, {})),
            "passages": sum(len(record.ids) for record in inventory.files.get(one.label, {}).values()),
            "tokens": one.settings.tokens,
            "overlap": one.settings.overlap,
        }
        for one in folders.values()
    ]
    whole = {"documents": facts.documents, "embedder": facts.embedder, "words": facts.words, "folders": rows}
    if as_json:
        json_line(whole)
        return
    console.print(f"{counted(facts.documents, 'document')}, embedder {facts.embedder or '(none)'}", highlight=False)
    for row in rows:
        gone = "" if row["there"] else " (not there now)"
        console.print(
            f"  {row['folder']}: {counted(row['files'], 'file')}, {counted(row['passages'], 'passage')} of up to "
            f"{row['tokens']} tokens, from {row['path'] or 'an unknown place'}{gone}",
            highlight=False,
            markup=False,
        )


@contextmanager
def _opened(
    store: Path, embedder: str | None, index_kind: str, *, is_new: bool, scratch: bool = False
) -> Iterator[FaissStore]:
    """Give the store open for writing; a scratch one, which nobody keeps, to try out what a new one would get."""
    from qwen_rerank.embedders import load_embedder
    from qwen_rerank.store import FaissStore

    if scratch:
        with tempfile.TemporaryDirectory() as folder, FaissStore.create(Path(folder, "store"), None) as made:
            yield made
        return
    if is_new:
        opened = FaissStore.create(store, load_embedder(embedder or options.DEFAULT_EMBEDDER), index=index_kind)
    else:
        opened = FaissStore.open(store, options.load_stored_embedder(store, embedder))
    with opened:
        yield opened


def _discard(store: Path) -> None:
    """Remove a new store into which nothing came."""
    from qwen_rerank.folders.records import RECORD
    from qwen_rerank.store.opening import remove_store

    (store / RECORD).unlink(missing_ok=True)
    remove_store(store, keep_folder=False)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None] | None]:
    """Give what shows how far a run is, and how long it will take; nothing where nobody looks."""
    from qwen_rerank.cli.show import counted, errors

    if not errors.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("files", total=None)

        def show(at: Progress) -> None:
            bar.update(
                task, completed=at.files, total=at.n_files, description=f"{counted(at.passages, 'passage')} · files"
            )

        yield show


def _print_report(report: SyncReport, *, verbose: bool) -> None:
    """Say on stderr what became of each file, and name what was left out."""
    from qwen_rerank.cli import show

    changed = [one for one in report.files if verbose or one.change != "unchanged"]
    for one in changed if verbose else changed[:_LINES]:
        notes = f" ({', '.join(one.notes)})" if one.notes else ""
        show.say(
            f"  {one.change:9}  {one.source}"
            + (f"  {show.counted(one.passages, 'passage')}{notes}" if one.kind else "")
        )
    if len(changed) > _LINES and not verbose:
        show.say(f"  … and {show.counted(len(changed) - _LINES, 'more file')}; --verbose lists them")
    for label, (before, after) in report.moved.items():
        show.say(f"{label} moved: {before} → {after}")
    for label in report.replaced:
        show.say(f"{label} lies in a folder that is indexed now, and went into it")
    show.left_out(report.skipped, verbose=verbose)
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items() if count) or "no files"
    passages = f"{show.counted(report.embedded, 'passage')} embedded, {report.reused} kept their vector, {report.deleted} removed"
    would = "Nothing was written; a run would give: " if report.dry_run else ""
    show.errors.print(escape(f"{would}{counts}; {passages}; {len(report.skipped)} skipped"), highlight=False)


def _watch(store: FaissStore, source: list[Path], seen: dict[str, tuple[int, int]]) -> None:
    """Index again whenever a file comes, goes or is written, until Ctrl-C."""
    from qwen_rerank.cli import show
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.folders import sync_folder

    show.say("watching; Ctrl-C ends it")
    try:
        while True:
            time.sleep(_WATCH_S)
            if (now := _state(source, store.path)) == seen:
                continue
            seen = now
            try:
                _print_report(sync_folder(store, source), verbose=False)
            except InvalidInputError as exc:  # a folder that is away for the moment, such as a drive
                show.say(str(exc))
    except KeyboardInterrupt:
        show.say("no longer watching")


def _state(source: list[Path], store: Path) -> dict[str, tuple[int, int]]:
    """Return path to time and size of everything below the sources, but for what lies in the store."""
    found = {}
    waiting = [path.expanduser().absolute() for path in source]
    roots = set(waiting)
    while waiting:
        path = waiting.pop()
        if path == store:
            continue
        try:
            state = path.stat(follow_symlinks=path in roots)
            is_folder = stat.S_ISDIR(state.st_mode)
            waiting += path.iterdir() if is_folder else ()
        except OSError:  # it went meanwhile, or may not be entered
            continue
        # Of a folder only that it is there: its own time also changes with a store inside it.
        found[str(path)] = (0, 0) if is_folder else (state.st_mtime_ns, state.st_size)
    return found
