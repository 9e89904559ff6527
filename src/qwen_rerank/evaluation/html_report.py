"""One self-contained HTML page from the JSON of evaluations: what it comes to, then each collection with tables and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen_rerank.documents import write_whole
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation import plots
from qwen_rerank.evaluation.results import threshold_sentence
from qwen_rerank.evaluation.sweep import money
from qwen_rerank.regular_files import read_regular

Row = Mapping[str, Any]
Cell = str | tuple[str, str]
"""Text, or (address within the page, text)."""

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--say:#2563eb;--warn:#d97706}
*{box-sizing:border-box}
body{font:16px/1.6 system-ui,-apple-system,"Segoe UI","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;
max-width:68rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.4rem;margin:3.5rem 0 .3rem;padding-top:.6rem;border-top:2px solid var(--line)}
h3{font-size:1.08rem;margin:2.2rem 0 .4rem}
p{max-width:46rem;margin:.6rem 0}a{color:var(--say)}
.facts,small,figcaption{color:#6b7280;font-size:.875rem}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums}
th{font-weight:600;border-bottom:2px solid var(--line);vertical-align:bottom}
td{border-bottom:1px solid var(--soft);vertical-align:top;white-space:nowrap}
th,td{padding:.35rem .5rem;text-align:right}
th.text,td.text{text-align:left}td.wide{white-space:normal;min-width:11rem}
tr.chosen td{background:#2563eb1c;font-weight:600}
.note,.say{padding:.5rem .9rem;border-left:4px solid;border-radius:0 4px 4px 0;max-width:none}
ul.note{list-style:none}.note{border-color:var(--warn);background:#d9770614;font-size:.9rem;margin:.4rem 0}
.say{border-color:var(--say);background:#2563eb14;font-weight:600}
.up{color:#16a34a}.down{color:#dc2626}
.pictures{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:.6rem 0;background:#fff;border:1px solid var(--line);border-radius:8px;padding:.8rem;flex:1 1 24rem;min-width:0}
figure svg{display:block;max-width:100%;height:auto;margin:auto}figcaption{margin-top:.5rem;color:#4b5563}
@media(max-width:40rem){td.wide{min-width:9rem}body{padding:1rem .8rem 3rem}th,td{padding:.3rem .35rem}figure{flex-basis:100%;padding:.4rem}}
details{margin:.6rem 0}summary{cursor:pointer}
"""

_READING = (
    "Every value is a mean over the queries named beside it; an interval of 95 % that excludes zero is a difference that these "
    "queries show, one that holds zero is none that they can show. A collection marked as in-domain was part of a model's "
    "training: its figures say how well that model remembers, not how well it searches."
)


def write_report(
    results: Sequence[Row], path: str | os.PathLike[str], *, title: str = "Two-stage retrieval, measured"
) -> None:
    """Write the page.

    Args:
        results: What `qwen-rerank eval run`, `sweep` and `calibrate` wrote, in any order.
        path: HTML file; it needs nothing beside itself and loads nothing from anywhere.
        title: Heading.
    """
    collections = _by_collection(results)
    sections = "".join(_collection(f"c{place}", name, collections[name]) for place, name in enumerate(collections))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><p>{_READING}</p>{_summary(collections)}{sections}{_environments(results)}"
        "</body></html>\n"
    )
    write_whole(page, path)


def read_results(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the JSON results of a folder, by file name.

    Raises:
        InvalidInputError: If there are none, or one cannot be read.
    """
    results = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            result = json.loads(read_regular(path))
        except (OSError, ValueError, RecursionError) as exc:
            raise InvalidInputError(
                f"{str(path)!r} cannot be read as JSON ({exc}); delete it, or make it again."
            ) from exc
        if isinstance(result, dict) and result.get("kind") in SECTIONS:
            results.append(result)
    if not results:
        raise InvalidInputError(
            f"{os.fspath(folder)!r} holds no result; make one first: qwen-rerank eval run COLLECTION --out {os.fspath(folder)}"
        )
    return results


def _by_collection(results: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the results of each collection, in the order of `SECTIONS`; other queries of it stand apart."""
    groups: dict[str, list[Row]] = {}
    for result in results:
        about = result["collection"]
        name = (
            f"{about['name']} ({about['split']}, {about['n_queries']:,} queries of {about['n_documents']:,} documents)"
        )
        groups.setdefault(name, []).append(result)
    order = list(SECTIONS)
    return {name: sorted(group, key=lambda result: order.index(result["kind"])) for name, group in groups.items()}


def _summary(collections: Mapping[str, Sequence[Row]]) -> str:
    rows = []
    for place, (name, group) in enumerate(collections.items()):
        says = [result["recommendation"] for result in group if result["kind"] == "sweep"]
        about = group[0]["collection"]
        in_domain = any(note.startswith("in-domain") for note in about["notes"])
        say = says[0] if says else _change(group)
        rows.append([(f"#c{place}", name), f"{about['n_queries']:,}", "yes" if in_domain else "", say])
    return table(["collection", "queries", "in-domain", "what it comes to"], rows, text={0, 2, 3}, wide={3})


def _change(group: Sequence[Row]) -> str:
    """Return in words what the last system of a run changed, or nothing where there is no run."""
    for result in group:
        if result["kind"] == "run" and (last := result["systems"][-1])["comparison"] is not None:
            c = last["comparison"]
            shown = "shown" if c["low"] > 0 or c["high"] < 0 else "not shown by these queries"
            return f"{last['label']}: {result['primary']} {c['difference']:+.3f} ({shown})"
    return ""


def _collection(anchor: str, name: str, group: Sequence[Row]) -> str:
    about = group[0]["collection"]
    facts = f"{about['n_documents']:,} documents, {about['n_queries']:,} queries with judgements"
    notes = dict.fromkeys(note for result in group for note in result["collection"]["notes"])
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    boxes = f'<ul class="note">{lines}</ul>' if notes else ""
    body = "".join(SECTIONS[result["kind"]](result) for result in group)
    return f'<h2 id="{anchor}">{escape(name)}</h2><p class="facts">{facts}</p>{boxes}{body}'


def _environments(results: Sequence[Row]) -> str:
    distinct = {json.dumps(result["environment"], sort_keys=True): result["environment"] for result in results}
    lines = []
    for env in distinct.values():
        packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
        gpus = ", ".join(env["gpus"]) or "no GPU"
        text = f"{env['processor']}, {env['cores']} cores, {gpus}; Python {env['python']}; {packages}"
        lines.append(f"<p><small>{escape(text)}</small></p>")
    return "<h2>Measured on</h2>" + "".join(lines)


def run_section(result: Row) -> str:
    """Return the systems of a run, what changed for each query, and the queries that changed most."""
    names = list(result["measures"])
    means: list[list[Cell]] = [
        [row["label"], *(f"{row['means'][name]:.3f}" for name in names)] for row in result["systems"]
    ]
    changes: list[list[Cell]] = [
        [row["label"], *_difference(row["comparison"])] for row in result["systems"] if row["comparison"] is not None
    ]
    head = [
        f"against {result['systems'][0]['label']}",
        f"Δ {result['primary']}",
        "95 % interval",
        "p (Holm)",
        "queries better / worse / same",
    ]
    pictures = [
        figure(
            plots.query_deltas(row["deltas"], primary=result["primary"]),
            f"{row['label']}: what changed against {result['systems'][0]['label']}, query by query",
        )
        for row in result["systems"]
        if row["comparison"] is not None
    ]
    gains: list[list[Cell]] = []
    if len({row.get("reranks") for row in result["systems"]} - {None}) > 1:
        gains = [[row["label"], *_difference(row["gain"])] for row in result["systems"] if row.get("gain") is not None]
    if result["scores"] is not None:
        caption = "Scores of relevant and of other candidates: the less they overlap, the better a threshold can work"
        pictures.append(figure(plots.score_histogram(**result["scores"]), caption))
    moves = "".join(
        _moves(f"Most {kind} by {result['examples_of']}", result[kind], result["primary"])
        for kind in ("helped", "hurt")
    )
    tables = table(["system", *names], means) + (table(head, changes) if changes else "")
    tables += table(["against the first stage that it reranks", *head[1:]], gains) if gains else ""
    return f"<h3>Both stages</h3>{_settings(result)}{tables}{_pictures(pictures)}{moves}"


def _settings(result: Row) -> str:
    """Return what a result was made with, in small print."""
    shown = [
        f"{name.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in result.get("settings", {}).items()
        if value not in (None, False, [])
    ]
    return f'<p class="facts">{escape("; ".join(shown))}</p>' if shown else ""


def _difference(c: Row) -> list[str]:
    return [
        f"{c['difference']:+.3f}",
        f"{c['low']:+.3f} … {c['high']:+.3f}",
        f"{c['p_corrected']:.4f}",
        f"{c['wins']} / {c['losses']} / {c['ties']}",
    ]


def _moves(title: str, moves: Sequence[Row], primary: str) -> str:
    if not moves:
        return ""
    rows: list[list[Cell]] = [
        [
            move["query"],
            f"{move['before']:.2f} → {move['after']:.2f}",
            f"{_rank(move['relevant_before'])} → {_rank(move['relevant_after'])}",
            move["top_before"],
            move["top_after"],
        ]
        for move in moves
    ]
    head = ["query", primary, "best relevant rank", "first before", "first after"]
    body = table(head, rows, text={0, 3, 4}, wide={0, 3, 4})
    return f"<details><summary>{escape(title)}: {len(moves)} queries with texts</summary>{body}</details>"


def _rank(rank: int | None) -> str:
    return "none" if rank is None else str(rank)


def sweep_section(result: Row) -> str:
    """Return the recommendation, every setting, and the pictures of quality against depth, time and money."""
    primary = result["primary"]
    others = [name for name in result["measures"] if name != primary]
    priced = result["outcomes"][0]["cost"] is not None
    head = ["", "setting", primary, "p50 ms", "p95 ms", "timed", *(["cost of 1,000"] if priced else []), *others]
    rows: list[list[Cell]] = [
        [
            f"{number}{' ★' if row['label'] in result['front'] else ''}",
            row["label"],
            f"{row['means'][primary]:.3f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            str(row.get("n_timed") or ""),
            *([money(row["cost"])] if priced else []),
            *(f"{row['means'][name]:.3f}" for name in others),
        ]
        for number, row in enumerate(result["outcomes"], start=1)
    ]
    chosen = {place for place, row in enumerate(result["outcomes"]) if row["label"] == result["recommended"]}
    return (
        f'<h3>Which setting?</h3><p class="say">{escape(result["recommendation"])}</p>{_settings(result)}'
        f"{table(head, rows, text={1}, chosen=chosen)}{_pictures(_sweep_pictures(result, priced))}"
    )


def _sweep_pictures(result: Row, priced: bool) -> list[str]:
    outcomes, primary = result["outcomes"], result["primary"]
    by_time = plots.quality_by_price(
        outcomes, result["front"], primary=primary, price="p95_ms", unit="milliseconds a search, 95th percentile"
    )
    pictures = [
        figure(plots.quality_by_depth(outcomes, primary=primary), "Quality by depth"),
        figure(by_time, "Quality by time. On the line (★): nothing is better and as fast; the numbers are the table's"),
    ]
    if priced:
        by_cost = plots.quality_by_price(
            outcomes, result["front_by_cost"], primary=primary, price="cost", unit="cost of 1,000 searches"
        )
        pictures.append(figure(by_cost, "Quality by cost. On the line: nothing is better and as cheap"))
    return pictures


def calibration_section(result: Row) -> str:
    """Return how far promised and observed probabilities lie apart, before and after, and the threshold."""
    rows: list[list[Cell]] = [
        [name, f"{result[name]['ece']:.4f}", f"{result[name]['brier']:.4f}"] for name in ("sigmoid", "calibrated")
    ]
    say = "" if result["threshold"] is None else f'<p class="say">{escape(threshold_sentence(result["threshold"]))}</p>'
    diagram = plots.reliability_diagram(result["sigmoid"]["bins"], result["calibrated"]["bins"])
    caption = "Promise and truth on queries that the fit had not seen; large dots hold many pairs"
    facts = f"{result['n_pairs']:,} pairs, {result['n_relevant']:,} of them relevant."
    return (
        f'<h3>What a score is worth</h3>{say}{_settings(result)}<p class="facts">{facts} Both errors are 0 at best.</p>'
        f"{table(['probability', 'calibration error', 'Brier score'], rows)}{_pictures([figure(diagram, caption)])}"
    )


SECTIONS: dict[str, Callable[[Row], str]] = {
    "sweep": sweep_section,
    "run": run_section,
    "calibration": calibration_section,
}


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    text: Iterable[int] = (0,),
    wide: Iterable[int] = (),
    chosen: Iterable[int] = (),
) -> str:
    """Return an HTML table.

    Args:
        head: Names of the columns.
        rows: Cells.
        text: Columns that are read from the left.
        wide: Columns whose text is broken into lines.
        chosen: Rows that stand out.
    """
    classes = [
        " ".join(name for name, columns in (("text", set(text)), ("wide", set(wide))) if place in columns)
        for place in range(len(head))
    ]
    header = "".join(f"<th{_class(kind)}>{escape(cell)}</th>" for cell, kind in zip(head, classes, strict=True))
    stands_out = set(chosen)
    body = "".join(
        f"<tr{_class('chosen' if place in stands_out else '')}>"
        + "".join(f"<td{_class(kind)}>{_content(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        + "</tr>"
        for place, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _content(cell: Cell) -> str:
    if isinstance(cell, tuple):
        return f'<a href="{escape(cell[0], quote=True)}">{escape(cell[1])}</a>'
    return escape(cell)


def figure(drawn: Any, caption: str) -> str:
    """Return a picture with its caption."""
    return f"<figure>{plots.svg(drawn)}<figcaption>{escape(caption)}</figcaption></figure>"


def _pictures(pictures: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""
