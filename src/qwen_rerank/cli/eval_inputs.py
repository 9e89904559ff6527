"""The inputs of `qwen-rerank eval`: its options, and the collection and rerankers that they name."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from tqdm import tqdm

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from qwen_rerank.evaluation.collection import Collection
    from qwen_rerank.reranker import LongDocuments, Reranker

Source = Annotated[
    str,
    typer.Argument(
        metavar="COLLECTION",
        help="A folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/), hub:owner/name@revision, or, with --labels or "
        "--topics and --qrels, your documents: a file or folder of .txt, .md, .jsonl, .csv.",
    ),
]
Split = Annotated[str, typer.Option("--split", help="Which judgements: the name of a file in qrels/.")]
Labels = Annotated[
    Path | None, typer.Option("--labels", help='Your own: lines of {"query": …, "relevant": \\[document ids]}.')
]
Topics = Annotated[Path | None, typer.Option("--topics", help="TREC topics, or id<tab>text lines; with --qrels.")]
Qrels = Annotated[Path | None, typer.Option("--qrels", help="TREC or BEIR judgements; with --topics.")]
FirstStages = Annotated[
    list[str],
    typer.Option("--first-stage", "-f", help="bm25, an embedder's name, or several joined by + (fused); repeatable."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help=f"Reranker: hub name, folder, server's address, 'mini' or 'pocket'; repeatable. By default {options.DEFAULT_MODEL}.",
    ),
]
Strategies = Annotated[
    list[str],
    typer.Option("--long-documents", help="truncate, windows or error; repeatable."),
]
Instructions = Annotated[
    list[str] | None,
    typer.Option("--instruction", "-i", help="What counts as relevant; '' is the model card's own; repeatable."),
]
Server = Annotated[
    str | None, typer.Option("--server", help="A rerank server's address, beside the models if any are named.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for runs, stores, scores and results.")]
Limit = Annotated[int | None, typer.Option("--queries", help="Only so many queries, for a first look.")]
Depth = Annotated[int, typer.Option("--depth", help="Candidates reranked.")]
Primary = Annotated[str, typer.Option("--measure", help="The measure that decides.")]


def speak() -> None:
    """Print on stderr what the evaluation logs: what it read and what it left out."""
    for name in ("qwen_rerank.evaluation", "qwen_rerank.documents"):
        log = logging.getLogger(name)
        if not any(isinstance(handler, _OnStderr) for handler in log.handlers):
            log.addHandler(_OnStderr())
        log.setLevel(logging.INFO)


class _OnStderr(logging.Handler):
    """Prints messages alone, however long, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        tqdm.write(record.getMessage(), file=sys.stderr)


def load(
    source: str,
    split: str,
    labels: Path | None = None,
    topics: Path | None = None,
    qrels: Path | None = None,
    queries: int | None = None,
) -> Collection:
    """Return the collection that the options name and say on stderr what is in it and what to read with care."""
    from qwen_rerank.checks import check_count
    from qwen_rerank.cli.show import errors
    from qwen_rerank.evaluation.collection import load_collection
    from qwen_rerank.evaluation.results import about

    if queries is not None:
        check_count("--queries", queries)
    collection = load_collection(source, split=split, labels=labels, topics=topics, qrels=qrels)
    if queries is not None and queries < len(collection.queries):
        collection = collection.head(queries)
    facts = about(collection)
    counts = f"{facts['n_documents']} documents, {facts['n_queries']} queries"
    errors.print(f"{facts['name']}/{facts['split']}: {counts}", highlight=False, markup=False)
    for note in facts["notes"]:
        errors.print(f"  {note}", style="yellow", highlight=False, markup=False)
    return collection


def rerankers(
    models: Sequence[str] | None,
    instructions: Sequence[str],
    strategies: Sequence[str],
    *,
    server: str | None,
    dialect: str,
    device: str,
    max_length: int | None,
) -> dict[str, Reranker]:
    """Return a reranker for every model, instruction and strategy, named by what differs; the server's come last."""
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.reranker import Reranker

    found: dict[str, Reranker] = {}
    for model in named(models, server):
        # Models and servers stand side by side, and each takes only what is meant for it.
        is_server = "://" in model
        scorer = options.load_scorer(
            model,
            dialect=dialect if is_server else "auto",
            device="auto" if is_server else device,
            max_length=max_length,
            api_key_env=options.API_KEY_ENV,
        )
        for instruction in instructions:
            for strategy in strategies:
                parts = [short(model)]
                parts += (
                    [f"“{_clipped(instruction)}”" if instruction else "default instruction"]
                    if len(instructions) > 1
                    else []
                )
                parts += [strategy] if len(strategies) > 1 else []
                name = " ".join(parts)
                if name in found:
                    raise InvalidInputError(
                        f"two settings are called {name!r}; give each one once, folders another name."
                    )
                found[name] = Reranker(
                    scorer, instruction=instruction or None, long_documents=cast("LongDocuments", strategy)
                )
    return found


def named(models: Sequence[str] | None, server: str | None) -> list[str]:
    """Return all rerankers by name: the models, or the default one where there is no server either, and the server."""
    return [*(models or ([] if server else [options.DEFAULT_MODEL])), *([server] if server else [])]


def _clipped(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def check(collection: Collection, *, least: int, measures: Sequence[str] = ()) -> int:
    """Refuse what would fail after all the work; return the deepest cut-off of the measures.

    Args:
        collection: What is measured on.
        least: Queries that are needed.
        measures: Names.

    Raises:
        InvalidInputError: If a measure is unknown, or there are too few queries.
    """
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.evaluation.measures import check_measures

    deepest = check_measures(measures)
    n = len(collection.queries)
    if n < least:
        raise InvalidInputError(
            f"{n} {'query' if n == 1 else 'queries'} with judgements cannot be evaluated; this needs at least {least} "
            "(see --queries and --split)."
        )
    return deepest


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say, when somebody stops the work, that the same command goes on where it was."""
    try:
        yield
    except KeyboardInterrupt:
        from qwen_rerank.cli.show import errors

        text = f"Stopped. What was scored is kept in {out / 'scores.db'}; the same command again goes on from there."
        errors.print(text, highlight=False, markup=False, soft_wrap=True)
        raise


def stem(collection: Collection, settings: Mapping[str, Any]) -> str:
    """Return the beginning of a result's file names, another one for any other collection, split, queries or settings.

    >>> from qwen_rerank.evaluation.collection import Collection
    >>> stem(Collection("scifact", "test", [], {"q": "?"}, {}), {"models": ["pocket"]})
    'scifact.test.1q.pocket.a6128b'
    """
    named = [short(name) for names in settings.values() if isinstance(names, list) for name in names]
    words = re.sub(r"[^\w+-]+", "_", "-".join(dict.fromkeys(map(str, named)))).strip("_")[:60]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:6]
    return f"{collection.name}.{collection.split}.{len(collection.queries)}q.{words}.{digest}"


def first_stages(names: Sequence[str]) -> dict[str, str]:
    """Return label to name of first stages, named as a table shows them.

    Raises:
        InvalidInputError: If two of them would have the same label.
    """
    from qwen_rerank.errors import InvalidInputError

    labels: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if labels.setdefault(short(name), name) != name:
            raise InvalidInputError(
                f"two first stages are called {short(name)!r}: {labels[short(name)]} and {name}; rename one folder."
            )
    return labels


def short(name: str) -> str:
    """Return the last part of a hub name, folder or address, which tells them apart in a table.

    >>> short("Qwen/Qwen3-Reranker-0.6B"), short("http://localhost:8000/v1/rerank"), short("bm25+models/minilm/")
    ('Qwen3-Reranker-0.6B', 'localhost:8000', 'bm25+minilm')
    """
    if "://" in name:
        return name.split("://", 1)[1].split("/", 1)[0].rsplit("@", 1)[-1]
    return "+".join(part.rstrip("/").rsplit("/", 1)[-1] for part in name.split("+"))
