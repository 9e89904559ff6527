"""One self-contained HTML page from the JSON of evaluations: what it comes to, then each collection with tables and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen_rerank.documents import write_whole
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.report_parts import SECTIONS, table

Row = Mapping[str, Any]

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
            result = json.loads(path.read_text(encoding="utf-8"))
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
    """Return the results of each collection, in the order of `SECTIONS`."""
    groups: dict[str, list[Row]] = {}
    for result in results:
        about = result["collection"]
        groups.setdefault(f"{about['name']} ({about['split']})", []).append(result)
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
