"""One self-contained HTML page from the JSON of evaluations: tables, pictures, and what to read with care."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation import plots

Row = Mapping[str, Any]

_STYLE = """
:root{color-scheme:light dark}body{font:16px/1.55 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{margin-top:2.5rem;border-bottom:1px solid #8884;padding-bottom:.3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #8883;vertical-align:top}
th:first-child,td:first-child,td.text{text-align:left}td.text{font-size:.85rem;min-width:14rem}
.note{background:#f59e0b22;border-left:4px solid #f59e0b;padding:.5rem .8rem;margin:.8rem 0}
.say{background:#2563eb18;border-left:4px solid #2563eb;padding:.6rem .9rem;margin:1rem 0;font-weight:600}
figure{margin:1rem 0;background:#fff;border-radius:6px;padding:.5rem}figure svg{max-width:100%;height:auto}
figcaption,small{color:#667}.best{font-weight:700}
"""


def write_report(
    results: Sequence[Row], path: str | os.PathLike[str], *, title: str = "Two-stage retrieval, measured"
) -> None:
    """Write the page.

    Args:
        results: What `qwen-rerank eval run`, `sweep` and `calibrate` wrote, one after the other.
        path: HTML file; it needs nothing beside itself.
        title: Heading.
    """
    body = "".join(_section(result) for result in results)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{_contents(results)}{body}{_environments(results)}</body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def read_results(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the JSON results of a folder, by name.

    Raises:
        InvalidInputError: If there are none, or one cannot be read.
    """
    results = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise InvalidInputError(f"{str(path)!r} cannot be read as JSON ({exc}).") from exc
        if isinstance(result, dict) and result.get("kind") in _SECTIONS:
            results.append(result)
    if not results:
        raise InvalidInputError(f"{os.fspath(folder)!r} holds no result; make one: qwen-rerank eval run …")
    return results


def _contents(results: Sequence[Row]) -> str:
    items = "".join(f'<li><a href="#{_anchor(r)}">{escape(_heading(r))}</a></li>' for r in results)
    return f"<ul>{items}</ul>"


def _heading(result: Row) -> str:
    return f"{result['collection']['name']} ({result['kind']})"


def _anchor(result: Row) -> str:
    return escape(f"{result['kind']}-{result['collection']['name']}", quote=True)


def _section(result: Row) -> str:
    about = result["collection"]
    facts = f"{about['n_documents']:,} documents, {about['n_queries']:,} queries ({escape(about['split'])})."
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in about["notes"])
    body = _SECTIONS[result["kind"]](result)
    return f'<h2 id="{_anchor(result)}">{escape(_heading(result))}</h2><p>{facts}</p>{notes}{body}'


def _run(result: Row) -> str:
    names = list(result["measures"])
    rows = [
        [row["label"], *(f"{row['means'][name]:.3f}" for name in names), *_difference(row)] for row in result["systems"]
    ]
    head = ["system", *names, f"change of {result['primary']}", "95 % interval", "p (Holm)", "better / worse / same"]
    pictures = [
        _figure(plots.query_deltas(row["deltas"], primary=result["primary"]), f"{row['label']}: change for each query")
        for row in result["systems"]
        if row["comparison"] is not None
    ]
    if result["scores"] is not None:
        histogram = plots.score_histogram(result["scores"]["relevant"], result["scores"]["others"])
        pictures.append(_figure(histogram, "scores of relevant and other candidates"))
    moves = "".join(_moves(f"Most {kind} queries", result[kind]) for kind in ("helped", "hurt"))
    return _table(head, rows) + "".join(pictures) + moves


def _difference(row: Row) -> list[str]:
    c = row["comparison"]
    if c is None:
        return ["", "", "", ""]
    interval = f"{c['low']:+.3f} … {c['high']:+.3f}"
    return [
        f"{c['difference']:+.3f}",
        interval,
        f"{c['p_corrected']:.4f}",
        f"{c['wins']} / {c['losses']} / {c['ties']}",
    ]


def _moves(title: str, moves: Sequence[Row]) -> str:
    if not moves:
        return ""
    rows = [
        [m["query"], f"{m['before']:.2f} → {m['after']:.2f}", m["top_before"][:200], m["top_after"][:200]]
        for m in moves
    ]
    return f"<h3>{title}</h3>" + _table(
        ["query", "measure", "first before", "first after"], rows, text_columns={0, 2, 3}
    )


def _sweep(result: Row) -> str:
    primary = result["primary"]
    head = ["setting", primary, *[m for m in result["measures"] if m != primary], "p50 ms", "p95 ms", "cost of 1,000"]
    rows = [
        [
            ("★ " if row["label"] in result["front"] else "") + row["label"],
            *(f"{row['means'][name]:.3f}" for name in [primary, *[m for m in result["measures"] if m != primary]]),
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            "" if row["cost"] is None else f"{row['cost']:.4f}",
        ]
        for row in result["outcomes"]
    ]
    pictures = _figure(plots.quality_by_depth(result["outcomes"], primary=primary), "quality by depth")
    by_time = plots.quality_by_price(
        result["outcomes"], result["front"], primary=primary, price="p95_ms", unit="ms a search (p95)"
    )
    pictures += _figure(by_time, "quality by time; ★ and the line: nothing is better and as fast")
    if result["outcomes"][0]["cost"] is not None:
        by_cost = plots.quality_by_price(
            result["outcomes"], result["front_by_cost"], primary=primary, price="cost", unit="cost of 1,000 searches"
        )
        pictures += _figure(by_cost, "quality by cost")
    return f'<p class="say">{escape(result["recommendation"])}</p>' + _table(head, rows) + pictures


def _calibrate(result: Row) -> str:
    rows = [[name, f"{result[name]['ece']:.4f}", f"{result[name]['brier']:.4f}"] for name in ("sigmoid", "calibrated")]
    t = result["threshold"]
    say = ""
    if t is not None:
        say = (
            f"Threshold {t['value']:.3f}: precision {t['precision']:.3f} ({t['precision_interval'][0]:.3f} … "
            f"{t['precision_interval'][1]:.3f}), recall of the candidates {t['recall']:.3f} "
            f"({t['recall_interval'][0]:.3f} … {t['recall_interval'][1]:.3f})."
        )
        say = f'<p class="say">{escape(say)}</p>'
    diagram = plots.reliability_diagram(result["sigmoid"]["bins"], result["calibrated"]["bins"])
    figure = _figure(diagram, "on queries that the fit had not seen; the diagonal is right")
    return say + _table(["probability", "calibration error", "Brier"], rows) + figure


_SECTIONS = {"run": _run, "sweep": _sweep, "calibration": _calibrate}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Iterable[int] = ()) -> str:
    wide = set(text_columns)
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=text' if i in wide else ''}>{escape(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(figure: Any, caption: str) -> str:
    return f"<figure>{plots.svg(figure)}<figcaption>{escape(caption)}</figcaption></figure>"


def _environments(results: Sequence[Row]) -> str:
    distinct = {json.dumps(result["environment"], sort_keys=True): result["environment"] for result in results}
    lines = []
    for env in distinct.values():
        packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
        gpus = ", ".join(env["gpus"]) or "no GPU"
        text = f"{env['processor']}, {env['cores']} cores, {gpus}; Python {env['python']}; {packages}"
        lines.append(f"<p><small>{escape(text)}</small></p>")
    return "<h2>Measured on</h2>" + "".join(lines)
