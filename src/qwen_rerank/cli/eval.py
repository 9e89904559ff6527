"""Commands of `qwen-rerank eval`: run, sweep, calibrate, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from qwen_rerank.evaluation.collection import Collection
    from qwen_rerank.reranker import LongDocuments, Reranker

CollectionFolder = Annotated[Path, typer.Argument(help="A folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/.")]
Split = Annotated[str, typer.Option("--split", help="Name of the qrels file.")]
FirstStages = Annotated[
    list[str],
    typer.Option("--first-stage", "-f", help="bm25, an embedder's name, or several joined by + (fused); repeatable."),
]
Models = Annotated[list[str], typer.Option("--model", "-m", help="Reranker: hub name, folder or 'pocket'; repeatable.")]
Strategies = Annotated[list[str], typer.Option("--long-documents", help="truncate or windows; repeatable.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for runs, stores, scores and results.")]
Limit = Annotated[int | None, typer.Option("--queries", help="Only so many queries, for a first look.")]
Depth = Annotated[int, typer.Option("--depth", help="Candidates reranked.")]
Primary = Annotated[str, typer.Option("--measure", help="The measure that decides.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = typer.Typer(help="Measure, compare, choose, calibrate: evidence for every choice.", no_args_is_help=True)
    for command in (run, sweep, calibrate, compare, report):
        group.command()(command)
    app.add_typer(group, name="eval")


def run(
    folder: CollectionFolder,
    first_stage: FirstStages = ["bm25"],  # noqa: B006 (typer copies it)
    model: Models = [options.DEFAULT_MODEL],  # noqa: B006
    split: Split = "test",
    depth: Depth = 100,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    server: options.Server = None,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    queries: Limit = None,
    primary: Primary = "nDCG@10",
    out: Out = Path("runs"),
) -> None:
    """Search a collection in both stages; write TREC runs, a table, and what changed for each query."""
    from qwen_rerank.evaluation.cache import ScoreCache
    from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run
    from qwen_rerank.evaluation.files import write_run
    from qwen_rerank.evaluation.results import run_result, write_result
    from qwen_rerank.evaluation.stages import first_stage as load_first_stage

    collection = _load(folder, split, queries)
    runs = {}
    scores = None
    with ScoreCache(out / "scores.db") as cache:
        for stage in first_stage:
            runs[stage] = found = recall(
                load_first_stage(stage, collection, folder=out / "stores"), collection, top_k=depth, name=stage
            ).run
            for name, reranker in _rerankers(model, [instruction], [long_documents], server, dialect, device).items():
                scores = score_run(reranker, collection, found, depth=depth, cache=cache, name=f"{stage} → {name}")
                runs[f"{stage} → {name} @{depth}"] = rerank_run(found, scores, depth=depth)
    result = run_result(collection, first_stage[0], runs, scores=scores, primary=primary)
    for name, lines in runs.items():
        tag = "".join(c if c.isalnum() or c in "@.-" else "_" for c in name)
        write_run(lines, out / f"{collection.name}.{tag}.run", tag=tag)
    write_result(result, out / f"{collection.name}.run.json")
    _print_run(result)
    _done(out, f"{collection.name}.run.json")


def sweep(
    folder: CollectionFolder,
    first_stage: FirstStages = ["bm25"],  # noqa: B006
    model: Models = [options.DEFAULT_MODEL],  # noqa: B006
    split: Split = "test",
    depth: Annotated[list[int], typer.Option("--depth", help="Candidates reranked; repeatable.")] = [10, 20, 50, 100],  # noqa: B006
    instruction: Annotated[
        list[str] | None, typer.Option("--instruction", "-i", help="An instruction to try; repeatable.")
    ] = None,
    long_documents: Strategies = ["truncate"],  # noqa: B006
    server: options.Server = None,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    queries: Limit = None,
    primary: Primary = "nDCG@10",
    timed: Annotated[int, typer.Option("--timed", help="Queries that are timed, one at a time.")] = 10,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", help="Of the machine this runs on.")
    ] = None,
    max_p95_ms: Annotated[float | None, typer.Option("--max-ms", help="Budget: milliseconds a search at p95.")] = None,
    max_cost: Annotated[float | None, typer.Option("--max-cost", help="Budget: cost of 1,000 searches.")] = None,
    out: Out = Path("runs"),
) -> None:
    """Try every first stage, model, instruction and depth; say which to take under your budget."""
    from qwen_rerank.cli.show import console
    from qwen_rerank.evaluation.cache import ScoreCache
    from qwen_rerank.evaluation.results import sweep_result, write_result
    from qwen_rerank.evaluation.stages import first_stage as load_first_stage
    from qwen_rerank.evaluation.sweep import recommend
    from qwen_rerank.evaluation.sweep import sweep as measure_all

    collection = _load(folder, split, queries)
    stages = {name: load_first_stage(name, collection, folder=out / "stores") for name in first_stage}
    with ScoreCache(out / "scores.db") as cache:
        outcomes = measure_all(
            collection,
            stages,
            _rerankers(model, instruction or [None], long_documents, server, dialect, device),
            depths=depth,
            primary=primary,
            cache=cache,
            n_timed=timed,
            price_per_hour=price_per_hour,
        )
    recommendation = recommend(outcomes, primary=primary, max_p95_ms=max_p95_ms, max_cost=max_cost)
    result = sweep_result(collection, outcomes, recommendation, primary=primary)
    write_result(result, out / f"{collection.name}.sweep.json")
    console.print(_sweep_table(result))
    console.print(f"[bold]{recommendation.sentence}[/]", highlight=False)
    _done(out, f"{collection.name}.sweep.json")


def calibrate(
    folder: CollectionFolder,
    calibration: Annotated[Path, typer.Option("--save", help="File for the calibration.")] = Path("calibration.json"),
    first_stage: Annotated[str, typer.Option("--first-stage", "-f", help="Where the candidates come from.")] = "bm25",
    model: options.Model = options.DEFAULT_MODEL,
    split: Split = "test",
    depth: Depth = 50,
    kind: Annotated[str, typer.Option("--kind", help="platt (few labels) or isotonic (thousands).")] = "platt",
    precision: Annotated[
        float | None, typer.Option("--precision", help="Find the threshold for this precision.")
    ] = None,
    recall: Annotated[float | None, typer.Option("--recall", help="Find the threshold for this recall.")] = None,
    judged_only: Annotated[bool, typer.Option("--judged-only", help="Leave out what nobody judged.")] = False,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    server: options.Server = None,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    queries: Limit = None,
    out: Out = Path("runs"),
) -> None:
    """Fit probabilities that mean something, and the threshold for a wanted precision or recall."""
    from qwen_rerank.checks import check_choice
    from qwen_rerank.cli.show import console
    from qwen_rerank.evaluation import experiment
    from qwen_rerank.evaluation.cache import ScoreCache
    from qwen_rerank.evaluation.results import calibration_result, write_result
    from qwen_rerank.evaluation.stages import first_stage as load_first_stage

    check_choice("kind", kind, ("platt", "isotonic"))
    collection = _load(folder, split, queries)
    (reranker,) = _rerankers([model], [instruction], [long_documents], server, dialect, device).values()
    stage = load_first_stage(first_stage, collection, folder=out / "stores")
    found = experiment.recall(stage, collection, top_k=depth, name=first_stage)
    with ScoreCache(out / "scores.db") as cache:
        scores = experiment.score_run(reranker, collection, found.run, depth=depth, cache=cache)
    fitted, result = calibration_result(
        collection,
        reranker,
        scores,
        kind="platt" if kind == "platt" else "isotonic",
        precision=precision,
        recall=recall,
        judged_only=judged_only,
    )
    fitted.save(calibration)
    write_result(result, out / f"{collection.name}.calibration.json")
    for name in ("sigmoid", "calibrated"):
        console.print(
            f"{name}: calibration error {result[name]['ece']:.4f}, Brier {result[name]['brier']:.4f}", highlight=False
        )
    if (t := result["threshold"]) is not None:
        low, high = t["precision_interval"]
        console.print(
            f"[bold]threshold {t['value']:.3f}[/]: precision {t['precision']:.3f} ({low:.3f} … {high:.3f}), "
            f"recall of the candidates {t['recall']:.3f}",
            highlight=False,
        )
    console.print(f"Use it: Reranker(scorer, calibration=Calibration.load({str(calibration)!r}))", highlight=False)
    _done(out, f"{collection.name}.calibration.json")


def compare(
    qrels: Annotated[Path, typer.Argument(help="TREC or BEIR judgements.")],
    baseline: Annotated[Path, typer.Argument(help="A TREC run.")],
    systems: Annotated[list[Path], typer.Argument(help="TREC runs to compare with it.")],
    primary: Primary = "nDCG@10",
) -> None:
    """Compare TREC runs query by query: interval, randomisation test, Holm's correction."""
    from qwen_rerank.cli.show import console
    from qwen_rerank.evaluation.files import read_qrels, read_run
    from qwen_rerank.evaluation.measures import measure
    from qwen_rerank.evaluation.significance import compare as compare_runs

    judged = read_qrels(qrels)
    measured = {str(path): measure(read_run(path), judged, [primary]) for path in (baseline, *systems)}
    values = {name: result.per_query[primary] for name, result in measured.items()}
    compared = compare_runs(values[str(baseline)], {str(path): values[str(path)] for path in systems})
    rows = []
    for name, result in measured.items():
        rows.append([name, f"{result.means[primary]:.4f}", *_difference(compared.get(name)), str(result.n_missing)])
    console.print(_table(["run", primary, "change", "95 % interval", "p (Holm)", "+/-/=", "unanswered"], rows))


def report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of run, sweep and calibrate.")] = Path("runs"),
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("report.html"),
) -> None:
    """Draw all results of a folder as one self-contained HTML page."""
    from qwen_rerank.cli.show import console
    from qwen_rerank.evaluation.report import read_results, write_report

    results = read_results(folder)
    write_report(results, html)
    console.print(f"{len(results)} results in {html}", highlight=False)


def _load(folder: Path, split: str, queries: int | None) -> Collection:
    from qwen_rerank.cli.show import errors
    from qwen_rerank.evaluation.collection import load_beir
    from qwen_rerank.evaluation.results import about

    collection = load_beir(folder, split=split)
    if queries is not None and queries < len(collection.queries):
        collection = collection.head(queries)
    facts = about(collection)
    errors.print(
        f"{facts['name']}/{facts['split']}: {facts['n_documents']} documents, {facts['n_queries']} queries",
        highlight=False,
    )
    for note in facts["notes"]:
        errors.print(f"  [yellow]{note}[/]", highlight=False)
    return collection


def _rerankers(
    models: Sequence[str],
    instructions: Sequence[str | None],
    strategies: Sequence[str],
    server: str | None,
    dialect: str,
    device: str,
) -> dict[str, Reranker]:
    """Return a reranker for every model, instruction and strategy, named by what differs."""
    from qwen_rerank.reranker import Reranker

    rerankers = {}
    for model in [server] if server else models:
        scorer = options.load_scorer(model, server=server, dialect=dialect, device=device)
        for instruction in instructions:
            for strategy in strategies:
                name = model.rsplit("/", 1)[-1]
                name += f" “{instruction}”" if len(instructions) > 1 and instruction else ""
                name += f" {strategy}" if len(strategies) > 1 else ""
                rerankers[name] = Reranker(
                    scorer, instruction=instruction, long_documents=cast("LongDocuments", strategy)
                )
    return rerankers


def _print_run(result: Mapping[str, object]) -> None:
    from qwen_rerank.cli.show import console
    from qwen_rerank.evaluation.significance import Comparison

    systems: list[dict[str, object]] = result["systems"]  # type: ignore[assignment]
    names: Sequence[str] = result["measures"]  # type: ignore[assignment]
    rows = []
    for row in systems:
        means: Mapping[str, float] = row["means"]  # type: ignore[assignment]
        comparison = row["comparison"]
        difference = _difference(Comparison(**comparison) if isinstance(comparison, dict) else None)
        rows.append([str(row["label"]), *(f"{means[name]:.4f}" for name in names), *difference])
    console.print(_table(["system", *names, "change", "95 % interval", "p (Holm)", "+/-/="], rows))


def _difference(comparison: object) -> list[str]:
    from qwen_rerank.evaluation.significance import Comparison

    if not isinstance(comparison, Comparison):
        return ["", "", "", ""]
    c = comparison
    return [
        f"{c.difference:+.4f}",
        f"{c.low:+.4f} … {c.high:+.4f}",
        f"{c.p_corrected:.4f}",
        f"{c.wins}/{c.losses}/{c.ties}",
    ]


def _sweep_table(result: Mapping[str, object]) -> Table:
    primary = str(result["primary"])
    front: Sequence[str] = result["front"]  # type: ignore[assignment]
    outcomes: list[dict[str, object]] = result["outcomes"]  # type: ignore[assignment]
    rows = []
    for row in outcomes:
        means: Mapping[str, float] = row["means"]  # type: ignore[assignment]
        label = str(row["label"])
        cost = "" if row["cost"] is None else f"{row['cost']:.4f}"
        rows.append(
            [
                ("★ " if label in front else "  ") + label,
                f"{means[primary]:.4f}",
                f"{row['p50_ms']:.1f}",
                f"{row['p95_ms']:.1f}",
                cost,
            ]
        )
    return _table(["setting (★: nothing is better and as fast)", primary, "p50 ms", "p95 ms", "cost of 1,000"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _done(out: Path, name: str) -> None:
    from qwen_rerank.cli.show import errors

    errors.print(f"{out / name} written. As a page: qwen-rerank eval report {out}", highlight=False)
