"""`qwen-rerank store …`: make a store, fill it, look after it, and move it from and to other formats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from qwen_rerank.protocols import Embedder
    from qwen_rerank.store import FaissStore
    from qwen_rerank.types import Document

app = typer.Typer(help="Make, fill and look after a store of documents.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The store's folder.", callback=options.expanded)]
Fields = Annotated[list[str] | None, typer.Option("--field", help="A metadata field to index for filters; repeatable.")]
IndexKind = Annotated[str, typer.Option("--index", help="auto, or a FAISS factory string such as HNSW32.")]
_NAMES = 3  # of replaced documents
_BATCH = 1000  # documents of one commit: what a killed `add` may have to do again


def register(parent: typer.Typer) -> None:
    """Add the commands to `parent`."""
    parent.add_typer(app, name="store")


@app.command()
def create(
    store: Folder,
    embedder: options.EmbedderName = options.DEFAULT_EMBEDDER,
    words_only: Annotated[bool, typer.Option("--words-only", help="No embedder: find by words alone.")] = False,
    index: IndexKind = "auto",
    metric: Annotated[str, typer.Option("--metric", help="cosine or ip.")] = "cosine",
    vectors: Annotated[str, typer.Option("--vectors", help="float32 or float16.")] = "float32",
    field: Fields = None,
) -> None:
    """Make an empty store."""
    from qwen_rerank.store import FaissStore

    model = None if words_only else _load(embedder)
    FaissStore.create(store, model, index=index, metric=metric, vectors=vectors, indexed_fields=field or ()).close()
    _say(f"{store} is made. Next: qwen-rerank store add {store} FOLDER")


@app.command()
def add(
    store: Folder,
    source: Annotated[list[Path], typer.Argument(help="Folders or files of every kind that `index` reads, uncut.")],
    embedder: options.StoredEmbedder = None,
    text_column: options.TextColumn = None,
    batch: Annotated[int, typer.Option("--batch", help="Documents of one commit.")] = _BATCH,
) -> None:
    """Add documents, or replace those whose text or metadata changed; a run that was killed goes on where it was."""
    from tqdm import tqdm

    from qwen_rerank.checks import check_count
    from qwen_rerank.cli.show import left_out
    from qwen_rerank.folders import read_files

    check_count("batch", batch)
    reading = read_files(source, text_column=text_column)
    left_out(reading.skipped)
    with _open(store, embedder=options.load_stored_embedder(store, embedder)) as opened:
        added, replaced = 0, []
        with tqdm(total=len(reading.documents), desc="add", unit="doc", disable=None) as bar:
            for some in _batches(reading.documents, batch):
                there = {document.id: document for document in opened.get([document.id for document in some])}
                new = [document for document in some if there.get(document.id) != document]
                opened.upsert(new)
                replaced += [document.id for document in new if document.id in there]
                added += len(new)
                bar.update(len(some))
        total = len(opened)
    same = len(reading.documents) - added
    _say(
        f"{added - len(replaced)} added, {len(replaced)} replaced, {same} were there already, {len(reading.skipped)} skipped; "
        f"{store} holds {total}."
    )
    if replaced:
        # Only the user knows whether a file changed, or one of the same name came from another folder.
        more = f", … and {len(replaced) - _NAMES} more" if len(replaced) > _NAMES else ""
        _say(
            f"Replaced: {', '.join(replaced[:_NAMES])}{more}. Of files of one name from several folders a store keeps one, "
            "unless one run names the folders together; `qwen-rerank index` keeps folders apart."
        )


@app.command()
def info(store: Folder, as_json: options.Json = False) -> None:
    """Show counts, settings and sizes."""
    with _open(store, read_only=True) as opened:
        found = asdict(opened.statistics())
    if as_json:
        from qwen_rerank.cli.show import json_line

        json_line(found)
        return
    found["file_bytes"] = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found["file_bytes"].items())
    for name, value in found.items():
        print(f"{name:<15} {', '.join(value) if isinstance(value, tuple) else value}")


@app.command()
def verify(store: Folder) -> None:
    """Check every byte; exit status 1 and one line for each thing that is wrong."""
    from qwen_rerank.store import verify_store

    report = verify_store(store)
    for problem in report.problems:
        print(problem)
    if not report.ok:
        raise typer.Exit(1)
    print(f"{report.documents} documents, all sound.")


@app.command()
def tune(
    store: Folder,
    queries: Annotated[Path | None, typer.Option("--queries", help="A file with one query a line.")] = None,
    target: Annotated[float, typer.Option("--target", help="Recall to reach, 0 to 1.")] = 0.95,
    embedder: options.StoredEmbedder = None,
) -> None:
    """Print recall against exact search over speed, and keep the first effort that can be expected to reach the target.

    Where none can, the last one is kept, and a line below says so.
    """
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.regular_files import read_regular

    asked = None
    if queries is not None:
        try:
            asked = [line for line in read_regular(queries).decode().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidInputError(
                f"{queries} cannot be read ({exc}); give a text file with one query a line."
            ) from exc
    with _open(store, embedder=options.load_stored_embedder(store, embedder) if asked else None) as opened:
        tried = opened.tune(asked, target=target)
    if not tried:
        print("The index compares all vectors: its recall is 1, and there is nothing to tune.")
        return
    print("effort  recall@100  at least  p50 ms  p95 ms")
    for one in tried:
        print(
            f"{one.effort:>6}  {one.recall:>10.4f}  {one.recall_low:>8.4f}  {one.p50_ms:>6.2f}  {one.p95_ms:>6.2f}{'  kept' if one.chosen else ''}"
        )
    if tried[-1].recall_low < target:
        print(f"No effort can be expected to reach {target:g} for other queries, too; the last one is kept.")
        if asked and len(asked) == 1:
            print("One query tells nothing of others; give more.")


@app.command()
def compact(store: Folder) -> None:
    """Build the indexes again without deleted documents, and give their space back."""
    from qwen_rerank.cli.show import counted

    with _open(store) as opened:
        opened.compact()
        _say(f"{store} holds {counted(len(opened), 'document')}.")


@app.command()
def delete(
    store: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents.")] = None,
    filter: options.StoreFilter = None,
) -> None:
    """Remove documents by id, or all that a filter keeps."""
    with _open(store) as opened:
        report = opened.delete(ids or None, filter=options.read_filter(filter))
    missing = f"; not there: {', '.join(report.not_found)}" if report.not_found else ""
    _say(f"{report.deleted} deleted{missing}.")


@app.command(name="export")
def export_(store: Folder, target: Annotated[Path, typer.Argument(help="Folder for the export.")]) -> None:
    """Write index.faiss and documents.jsonl, which FAISS and LangChain's store load."""
    from qwen_rerank.cli.show import counted
    from qwen_rerank.store import export_store

    with _open(store, read_only=True) as opened:
        count = export_store(opened, target)
    _say(f"{counted(count, 'document')} and their vectors are in {target}.")


@app.command(name="import")
def import_(
    store: Folder,
    source: Annotated[
        Path, typer.Argument(help="Folder with index.faiss and documents.jsonl, or LangChain's index.pkl.")
    ],
    embedder: options.StoredEmbedder = None,
) -> None:
    """Take documents with their vectors from an export, or from a folder of LangChain's FAISS store (nothing is unpickled)."""
    from tqdm import tqdm

    from qwen_rerank.cli.show import counted
    from qwen_rerank.store import FaissStore, read_export
    from qwen_rerank.store.opening import holds_nothing

    read = read_export(source)
    is_new = holds_nothing(store)
    model = _load(embedder or options.DEFAULT_EMBEDDER) if is_new else options.load_stored_embedder(store, embedder)
    with FaissStore.open_or_create(store, model) as opened:
        for start in tqdm(range(0, len(read.documents), _BATCH), desc="import", disable=None):
            some = slice(start, start + _BATCH)
            opened.upsert(read.documents[some], vectors=read.vectors[some])
        _say(f"{counted(len(read.documents), 'document')} imported; {store} holds {len(opened)}.")


def _open(store: Path, *, embedder: Embedder | None = None, read_only: bool = False) -> FaissStore:
    from qwen_rerank.store import FaissStore

    return FaissStore.open(store, embedder, read_only=read_only)


def _load(name: str) -> Embedder:
    from qwen_rerank.embedders import load_embedder

    return load_embedder(name)


def _batches(documents: list[Document], size: int) -> Iterable[list[Document]]:
    return (documents[start : start + size] for start in range(0, len(documents), size))


def _say(text: str) -> None:
    from qwen_rerank.cli.show import say

    say(text)
