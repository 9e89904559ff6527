"""Tables and picture of a store at scale, drawn from `scale.json`, `indexes.json`, `peers.json` into the README beside them.

python eval/store/draw_scale.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
DRAWN = re.compile(r"(?<=<!-- drawn from scale.json -->\n).*?(?=<!-- until here -->)", re.DOTALL)


def picture(found: dict[str, Any], target: Path) -> None:
    """Draw recall against the exact answer over the time of a query, for each effort."""
    tuned = found["tuned"]
    mpl.rcParams["svg.hashsalt"] = "scale"  # the same picture from the same figures
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([one["p50_ms"] for one in tuned], [one["recall"] for one in tuned], "o-", color="#3b6ea5")
    for one in tuned[::4] if tuned[-1] in tuned[::4] else [*tuned[::4], tuned[-1]]:
        label = f"{one['effort']} {looked_into(found)}" + (", kept" if one["chosen"] else "")
        axes.annotate(label, (one["p50_ms"], one["recall"]), (6, -10), textcoords="offset points", fontsize=8)
    axes.axhline(0.95, color="#999", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="median milliseconds of a dense query",
        ylabel="recall of the exact 100 best",
        title=f"{found['setting']['passages']:,} passages, {found['index']}, {found['setting']['measuring']['threads']} threads",
    )
    figure.savefig(target, metadata={"Date": None})


def looked_into(found: dict[str, Any]) -> str:
    """Return what the effort of a search counts."""
    return "nodes" if found["index"].startswith("HNSW") else "lists"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown whose columns after the first are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def bar(met: bool, text: str) -> str:
    """Return a bar with whether it is met."""
    return f"{text}: {'met' if met else '**not met**'}"


def searches(found: dict[str, Any]) -> str:
    """Return the table of times and recall."""
    raw, ids, dense, hybrid = (found[name]["p50_ms"] for name in ("raw_faiss_ids", "store_ids", "dense", "hybrid"))
    recall = found["dense"]["recall"]
    few = found["dense, 0.1% kept"]["p50_ms"]
    bars = {
        "store_ids": bar(ids <= 1.1 * raw, f"{ids / raw - 1:+.0%} of at most +10 %"),
        "dense": bar(dense <= 3 and recall >= 0.95, "at most 3 ms at 0.95"),
        "hybrid": bar(hybrid <= 15, "at most 15 ms"),
        "get_100_documents": bar(found["get_100_documents"]["p50_ms"] <= 1, "at most 1 ms"),
        "dense, 0.1% kept": bar(few <= 2 * dense, "at most twice the unfiltered"),
    }
    names = {
        "raw_faiss_ids": f"raw FAISS, ids ({found['index']}, {found['tuned'][-1]['effort']} {looked_into(found)})",
        "store_ids": "the store, ids",
        "dense": "dense, 100 documents",
        "lexical": "lexical, 100 documents",
        "hybrid": "hybrid, 100 documents",
        "get_100_documents": "100 documents by id",
    }
    names |= {name: f"dense, a filter that keeps {float(name[7:-6]):g} %" for name in found if name.endswith("kept")}
    rows = [
        [
            text,
            found[name]["p50_ms"],
            found[name]["p95_ms"],
            found[name].get("new_filter_p50_ms", ""),
            found[name].get("recall", ""),
            bars.get(name, ""),
        ]
        for name, text in names.items()
    ]
    return table(["", "p50, ms", "p95, ms", "p50 of a new filter, ms", "recall@100", "bar"], rows)


def sentences(found: dict[str, Any]) -> str:
    """Return under which conditions the figures were taken, and those that are no searches."""
    setting, built, size = found["setting"], found["build"], found["file_mb"]
    measuring, building = setting["measuring"], setting["building"]
    allowed = 1.2 * (found["raw_read_index_s"] + found["sha256_of_all_files_s"])
    opened = found["open_and_first_search_s"]
    return (
        f"{setting['passages']:,} distinct passages, {setting['dim']} dimensions, {setting['queries']} queries; "
        f"{measuring['threads']} threads of {measuring['cpu']}, load {measuring['load']} before and "
        f"{setting['load_after']} after; FAISS {measuring['faiss']}, SQLite {measuring['sqlite']}.\n\n"
        f"Open and first search: {opened} s, of at most {allowed:.2f} s, which is 1.2 times reading the index "
        f"({found['raw_read_index_s']} s) and one pass of SHA-256 ({found['sha256_of_all_files_s']} s): "
        f"{'met' if opened <= allowed else '**not met**'}. Embedding took {setting['embed_s']} s, adding "
        f"{built['add_s']} s, the index included (batches of 20,000, every one durable; load {building['load']} "
        f"before), tuning {found['tune_s']} s. On the disk: "
        + ", ".join(f"{name} {megabytes:,.0f} MB" for name, megabytes in size.items())
        + f". Peak memory: {built['peak_memory_gb']} GB while building, the vectors and texts to be added included, and "
        f"{found['peak_memory_gb']} GB while measuring.\n"
    )


def peers(found: dict[str, Any]) -> str:
    """Return the table of the stores of other packages."""
    stores = ("FaissStore", "LangChain", "LlamaIndex")
    rows = [
        [
            text,
            *(
                value["p50_ms"] if isinstance(value, dict) else value
                for value in (found[store].get(name, "") for store in stores)
            ),
        ]
        for name, text in {
            "add_s": "add, s",
            "save_s": "save, s",
            "load_s": "open, s",
            "search": "search, p50 ms",
            "filtered": "with a filter that keeps 1 %, p50 ms",
            "filtered_found": "documents that it gives, of 100",
            "filtered_if_all_are_fetched": "with the filter, all fetched before it, p50 ms",
            "delete_one_s": "delete one, s",
            "delete_one": "the same",
        }.items()
    ]
    setting = found["setting"]
    versions = ", ".join(f"{name} {one}" for name, one in setting.items() if name.startswith(("langchain", "llama")))
    return (
        f"\nBeside the stores of LangChain and LlamaIndex, {setting['passages']:,} of the passages, an exact index in "
        f"each ({versions}; load {setting['load']} before and {setting['load_after']} after):\n\n"
        + table(["", *stores], [row for row in rows if any(one != "" for one in row[1:])])
    )


def indexes(found: dict[str, Any]) -> str:
    """Return the table of kinds of indexes, each at the first effort that finds enough."""
    setting = found["setting"]
    rows = [
        [f"`{name}`", one["build_s"], one["mb"], last["effort"], last["recall"], last["p50_ms"], last["p95_ms"]]
        for name, one in found.items()
        if name != "setting"
        for last in one["efforts"][-1:]
    ]
    return (
        f"\nKinds of indexes, FAISS alone, {setting['passages']:,} of the passages, {setting['threads']} threads (load "
        f"{setting['load']} before and {setting['load_after']} after); effort is how many lists or nodes a search looks into:\n\n"
        + table(["", "build, s", "MB", "effort", "recall@100", "p50, ms", "p95, ms"], rows)
    )


def main() -> None:
    """Draw what has been measured."""
    found = json.loads((FOLDER / "scale.json").read_text(encoding="utf-8"))
    picture(found, FOLDER / "scale.svg")
    drawn = f"{sentences(found)}\n{searches(found)}"
    for part in (indexes, peers):
        if (file := FOLDER / f"{part.__name__}.json").exists():
            drawn += part(json.loads(file.read_text(encoding="utf-8")))
    page = FOLDER / "README.md"
    page.write_text(DRAWN.sub(lambda _: drawn, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
