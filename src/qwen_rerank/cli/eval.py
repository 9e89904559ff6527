"""Commands of `qwen-rerank eval`: run, sweep, calibrate, compare, report."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from qwen_rerank.cli import eval_inputs as inputs
from qwen_rerank.cli import options


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = typer.Typer(help="Measure, compare, choose, calibrate: evidence for every choice.", no_args_is_help=True)
    group.callback()(inputs.speak)
    for command in (run, sweep, calibrate, compare, report):
        group.command()(command)
    app.add_typer(group, name="eval")


def run(
    source: inputs.Source,
    first_stage: inputs.FirstStages = ["bm25"],  # noqa: B006 (typer copies it)
    model: inputs.Models = None,
    split: inputs.Split = "test",
    labels: inputs.Labels = None,
    topics: inputs.Topics = None,
    qrels: inputs.Qrels = None,
    depth: inputs.Depth = 100,
    instruction: options.Instruction = None,
    long_documents: options.LongDocuments = "truncate",
    server: inputs.Server = None,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    max_length: options.MaxLength = None,
    queries: inputs.Limit = None,
    primary: inputs.Primary = "nDCG@10",
    first_stage_only: Annotated[
        bool, typer.Option("--first-stage-only", help="Measure the first stages alone and load no reranker.")
    ] = False,
    export: Annotated[bool, typer.Option("--export", help="Also write what EvalScope and mteb read.")] = False,
    out: inputs.Out = Path("runs"),
) -> None:
    """Search a collection in both stages; write TREC runs, a table, and what changed for each query."""
    from qwen_rerank.checks import check_count
    from qwen_rerank.cli.show import console, print_table, run_tables
    from qwen_rerank.documents import write_run
    from qwen_rerank.documents.judgements import check_run_names
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.evaluation import export as exports
    from qwen_rerank.evaluation.cache import ScoreCache
    from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run
    from qwen_rerank.evaluation.measures import DEFAULT_MEASURES
    from qwen_rerank.evaluation.results import run_result, write_result
    from qwen_rerank.evaluation.stages import first_stage as load_first_stage

    if first_stage_only and (model or server):
        raise InvalidInputError("--first-stage-only loads no reranker; leave --model and --server out.")
    check_count("--depth", depth)
    collection = inputs.load(source, split, labels, topics, qrels, queries)
    deepest = inputs.check(collection, least=2, measures=(primary, *DEFAULT_MEASURES))
    check_run_names([*collection.queries, *(document.id for document in collection.documents)])
    stages = inputs.first_stages(first_stage)
    rerankers = {}
    if not first_stage_only:
        rerankers = inputs.rerankers(
            model,
            [instruction or ""],
            [long_documents],
            server=server,
            dialect=dialect,
            device=device,
            max_length=max_length,
        )
    settings = {
        "first_stages": list(stages.values()),
        "rerankers": [] if first_stage_only else inputs.named(model, server),
        "depth": depth,
        "instruction": instruction,
        "long_documents": long_documents,
        "max_length": max_length,
        "measure": primary,
    }
    runs, reranks = {}, {}
    scores = None
    with inputs.resumable(out), ScoreCache(out / "scores.db") as cache:
        for label, stage in stages.items():
            recalling = load_first_stage(stage, collection, folder=out / "stores")
            runs[label] = found = recall(recalling, collection, top_k=max(depth, deepest), name=label).run
            for name, reranker in rerankers.items():
                reranked = f"{label} → {name} @{depth}"
                scores = score_run(reranker, collection, found, depth=depth, cache=cache, name=f"{label} → {name}")
                runs[reranked] = rerank_run(found, scores, depth=depth)
                reranks[reranked] = label
    first = next(iter(stages))
    result = run_result(collection, first, runs, scores=scores, primary=primary, reranks=reranks, settings=settings)
    stem = inputs.stem(collection, settings)
    for name, lines in runs.items():
        tag = _file_name(name)
        write_run(lines, out / f"{stem}.{tag}.run", tag=tag)
        if export:
            exports.write_predictions(lines, out / f"{stem}.{tag}.predictions.json", model=tag, split=split)
    if export:
        exports.write_samples(collection, runs[first], out / f"{stem}.samples.jsonl", depth=depth)
    exports.write_per_query(collection, runs, out / f"{stem}.per_query.csv", measures=result["measures"])
    write_result(result, out / f"{stem}.run.json")
    for made in run_tables(result):
        print_table(console, made)
    _done(out, f"{stem}.run.json")


def sweep(
    source: inputs.Source,
    first_stage: inputs.FirstStages = ["bm25"],  # noqa: B006
    model: inputs.Models = None,
    split: inputs.Split = "test",
    labels: inputs.Labels = None,
    topics: inputs.Topics = None,
    qrels: inputs.Qrels = None,
    depth: Annotated[list[int], typer.Option("--depth", help="Candidates reranked; repeatable.")] = [10, 20, 50, 100],  # noqa: B006
    instruction: inputs.Instructions = None,
    long_documents: inputs.Strategies = ["truncate"],  # noqa: B006
    server: inputs.Server = None,
    dialect: options.Dialect = "auto",
    device: options.Device = "auto",
    max_length: options.MaxLength = None,
    queries: inputs.Limit = None,
    primary: inputs.Primary = "nDCG@10",
    timed: Annotated[int, typer.Option("--timed", help="Queries that are timed, one at a time.")] = 10,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", help="Of the machine that this runs on.")
    ] = None,
    price_per_1000: Annotated[
        float | None, typer.Option("--price-per-1000", help="What --server's provider takes for 1,000 searches.")
    ] = None,
    max_p95_ms: Annotated[float | None, typer.Option("--max-ms", help="Budget: milliseconds a search at p95.")] = None,
    max_cost: Annotated[float | None, typer.Option("--max-cost", help="Budget: cost of 1,000 searches.")] = None,
    out: inputs.Out = Path("runs"),
) -> None:
    """Try every first stage, model, instruction, long-document strategy and depth; say which to take under your budget.

    Scores are kept on disk: a sweep that broke off, called again, goes on where it was.
    """
    from qwen_rerank.checks import check_choice, check_count
    from qwen_rerank.cli.show import console, print_table, sweep_table
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.evaluation import sweep as sweeping
    from qwen_rerank.evaluation.cache import ScoreCache
    from qwen_rerank.evaluation.measures import DEFAULT_MEASURES
    from qwen_rerank.evaluation.results import sweep_result, write_result
    from qwen_rerank.evaluation.stages import first_stage as load_first_stage
    from qwen_rerank.reranker import LongDocuments

    _check_prices(server, price_per_hour, price_per_1000, max_cost, max_p95_ms)
    for each in depth:
        check_count("--depth", each)
    check_count("--timed", timed)
    for strategy in long_documents:
        check_choice("--long-documents", strategy, get_args(LongDocuments))
    collection = inputs.load(source, split, labels, topics, qrels, queries)
    inputs.check(collection, least=2, measures=(primary, *DEFAULT_MEASURES))
    stages = {
        label: load_first_stage(name, collection, folder=out / "stores")
        for label, name in inputs.first_stages(first_stage).items()
    }
    rerankers = inputs.rerankers(
        model,
        instruction or [""],
        long_documents,
        server=server,
        dialect=dialect,
        device=device,
        max_length=max_length,
    )
    settings = {
        "first_stages": list(first_stage),
        "rerankers": inputs.named(model, server),
        "depths": tuple(depth),
        "instructions": tuple(instruction or [""]),
        "strategies": tuple(long_documents),
        "max_length": max_length,
        "measure": primary,
    }
    fees = None
    if server is not None and price_per_1000 is not None:
        fees = {name: price_per_1000 for name in rerankers if name.startswith(inputs.short(server))}
    with inputs.resumable(out), ScoreCache(out / "scores.db") as cache:
        outcomes = sweeping.sweep(
            collection,
            stages,
            rerankers,
            depths=depth,
            primary=primary,
            cache=cache,
            n_timed=timed,
            price_per_hour=price_per_hour,
            fees=fees,
        )
    unkept = None
    try:
        advice = sweeping.recommend(outcomes, primary=primary, max_p95_ms=max_p95_ms, max_cost=max_cost)
    except InvalidInputError as exc:  # what was measured is kept, the budget can be given anew
        unkept = exc
        advice = sweeping.Recommendation(None, str(exc))
    result = sweep_result(collection, outcomes, advice, primary=primary, rerankers=rerankers, settings=settings)
    name = f"{inputs.stem(collection, settings)}.sweep.json"
    write_result(result, out / name)
    print_table(console, sweep_table(result))
    _done(out, name)
    if unkept is not None:
        raise unkept
    console.print(advice.sentence, style="bold", highlight=False, markup=False)


def calibrate(
    source: inputs.Source,
    calibration: Annotated[
        Path | None,
        typer.Option("--save", help="File for the calibration; by default one in --out named by its settings."),
    ] = None,
    first_stage: Annotated[str, typer.Option("--first-stage", "-f", help="Where the candidates come from.")] = "bm25",
    model: options.Model = options.DEFAULT_MODEL,
    split: inputs.Split = "test",
    labels: inputs.Labels = None,
    topics: inputs.Topics = None,
    qrels: inputs.Qrels = None,
    depth: inputs.Depth = 50,
    kind: Annotated[
        Literal["platt", "isotonic"], typer.Option("--kind", help="platt (few labels) or isotonic (thousands).")
    ] = "platt",
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
    max_length: options.MaxLength = None,
    queries: inputs.Limit = None,
    out: inputs.Out = Path("runs"),
) -> None:
    """Fit probabilities that mean something, and the threshold for a wanted precision or recall."""
    from qwen_rerank.checks import check_count
    from qwen_rerank.cli.show import console
    from qwen_rerank.errors import InvalidInputError
    from qwen_rerank.evaluation import experiment
    from qwen_rerank.evaluation.cache import ScoreCache
    from qwen_rerank.evaluation.calibrate import N_FOLDS, check_labels, check_wanted
    from qwen_rerank.evaluation.results import calibration_result, threshold_sentence, write_result
    from qwen_rerank.evaluation.stages import first_stage as load_first_stage

    check_wanted(precision, recall)
    check_count("--depth", depth)
    if calibration is not None and not calibration.absolute().parent.is_dir():
        raise InvalidInputError(
            f"--save {calibration} is in a folder that is not there; make it, or name another file."
        )
    if calibration is not None and calibration.is_dir():
        raise InvalidInputError(f"--save {calibration} is a folder; name a file.")
    collection = inputs.load(source, split, labels, topics, qrels, queries)
    inputs.check(collection, least=N_FOLDS)
    stage = load_first_stage(first_stage, collection, folder=out / "stores")
    found = experiment.recall(stage, collection, top_k=depth, name=inputs.short(first_stage))
    check_labels(found.run, collection.qrels, judged_only=judged_only)
    (reranker,) = inputs.rerankers(
        [] if server else [model],
        [instruction or ""],
        [long_documents],
        server=server,
        dialect=dialect,
        device=device,
        max_length=max_length,
    ).values()
    settings = {
        "first_stages": [first_stage],
        "rerankers": [server or model],
        "depth": depth,
        "instruction": instruction,
        "long_documents": long_documents,
        "max_length": max_length,
        "kind": kind,
        "judged_only": judged_only,
        "precision": precision,
        "recall": recall,
    }
    stem = inputs.stem(collection, settings)
    with inputs.resumable(out), ScoreCache(out / "scores.db") as cache:
        scores = experiment.score_run(reranker, collection, found.run, depth=depth, cache=cache)
    fitted, result = calibration_result(
        collection,
        reranker,
        scores,
        kind=kind,
        precision=precision,
        recall=recall,
        judged_only=judged_only,
        settings=settings,
    )
    calibration = calibration or out / f"{stem}.fitted.json"
    fitted.save(calibration)
    write_result(result, out / f"{stem}.calibration.json")
    console.print(f"{result['n_pairs']} pairs, {result['n_relevant']} of them relevant", highlight=False)
    for name in ("sigmoid", "calibrated"):
        quality = result[name]
        console.print(f"{name}: calibration error {quality['ece']:.4f}, Brier {quality['brier']:.4f}", highlight=False)
    if result["threshold"] is not None:
        console.print(threshold_sentence(result["threshold"]), style="bold", highlight=False, markup=False)
    use = f"Use it: --calibration {calibration} of search, rerank and serve, or Calibration.load({str(calibration)!r})"
    console.print(use, highlight=False, markup=False, soft_wrap=True)
    _done(out, f"{stem}.calibration.json")


def compare(
    qrels: Annotated[Path, typer.Argument(help="TREC or BEIR judgements.")],
    baseline: Annotated[Path, typer.Argument(help="A TREC run.")],
    systems: Annotated[list[Path], typer.Argument(help="TREC runs to compare with it.")],
    primary: inputs.Primary = "nDCG@10",
) -> None:
    """Compare TREC runs query by query: interval, randomisation test, Holm's correction."""
    from qwen_rerank.cli.show import compare_table, console, errors, print_table
    from qwen_rerank.documents import read_qrels, read_run
    from qwen_rerank.evaluation.results import compare_result

    judged = read_qrels(qrels)
    runs = {str(path): read_run(path) for path in dict.fromkeys((baseline, *systems))}
    compared = compare_result(runs, judged, primary=primary)
    print_table(console, compare_table(compared, primary))
    for row in compared:
        if row["n_missing"]:
            note = (
                f"{row['label']} leaves {row['n_missing']} of {len(judged)} judged queries unanswered; they count as 0."
            )
            errors.print(note, highlight=False, markup=False, soft_wrap=True)


def report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of run, sweep and calibrate.")] = Path("runs"),
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option("--title", help="Its heading.")] = "Two-stage retrieval, measured",
) -> None:
    """Draw all results of a folder as one self-contained HTML page."""
    from qwen_rerank.cli.show import console
    from qwen_rerank.evaluation.html_report import read_results, write_report

    results = read_results(folder)
    write_report(results, html, title=title)
    console.print(f"{len(results)} results in {html}", highlight=False, markup=False)


def _check_prices(
    server: str | None,
    price_per_hour: float | None,
    price_per_1000: float | None,
    max_cost: float | None,
    max_p95_ms: float | None,
) -> None:
    """Refuse a budget that no price serves, before hours are spent on measuring."""
    from qwen_rerank.errors import InvalidInputError

    given = {
        "--price-per-hour": price_per_hour,
        "--price-per-1000": price_per_1000,
        "--max-cost": max_cost,
        "--max-ms": max_p95_ms,
    }
    for name, value in given.items():
        if value is not None and not 0 <= value < math.inf:
            raise InvalidInputError(f"{name} must be a number of at least 0, not {value!r}.")
    if price_per_1000 is not None and server is None:
        raise InvalidInputError("--price-per-1000 is the price of a server's provider; give --server, too.")
    if max_cost is not None and price_per_hour is None and price_per_1000 is None:
        raise InvalidInputError("--max-cost needs a price; give --price-per-hour or --price-per-1000.")


def _file_name(label: str) -> str:
    """Return a label as a word that a file name and a TREC run can carry."""
    return re.sub(r"[^\w@.+-]+", "_", label.replace(" → ", "-then-")).strip("_")


def _done(out: Path, name: str) -> None:
    from qwen_rerank.cli.show import errors

    errors.print(
        f"{out / name} written. As a page: qwen-rerank eval report {out}", highlight=False, markup=False, soft_wrap=True
    )
