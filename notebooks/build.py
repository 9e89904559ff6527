"""Make the notebooks: one source of code cells, an English and a Chinese text around them.

    python notebooks/build.py              # execute all, write notebooks/en and notebooks/zh
    python notebooks/build.py 01 05        # only these
    python notebooks/build.py --check      # execute all, write nothing, fail if a committed notebook is not made from its source

A source in notebooks/src is a script in jupytext's percent format. Its markdown cells carry `lang="en"` or `lang="zh"`; a cell
without a language goes into both. The code runs once, in an empty folder, and both notebooks get the same outputs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
TIMEOUT_S = 600


def main() -> None:
    """Execute the sources and write or check the notebooks."""
    parser = argparse.ArgumentParser(description="Make the notebooks from their sources.")
    parser.add_argument("only", nargs="*", help="numbers, e.g. 01 05")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a committed notebook differs from its source"
    )
    arguments = parser.parse_args()
    sources = [p for p in sorted((HERE / "src").glob("*.py")) if not arguments.only or p.name[:2] in arguments.only]
    stale = []
    for source in tqdm(sources, desc="notebooks", disable=None):
        executed = execute(source)
        for language in LANGUAGES:
            path = HERE / language / f"{source.stem}.ipynb"
            notebook = in_language(executed, language)
            if arguments.check:
                stale += [] if path.is_file() and same_source(notebook, nbformat.read(path, as_version=4)) else [path]
            else:
                path.parent.mkdir(exist_ok=True)
                nbformat.write(notebook, path)
    if stale:
        sys.exit(f"not made from their sources: {', '.join(map(str, stale))}; run: python notebooks/build.py")
    print(f"{len(sources)} notebooks executed in both languages")


def execute(source: Path) -> nbformat.NotebookNode:
    """Return the source as a notebook with its outputs."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": folder}}).execute()
    return notebook


def in_language(notebook: nbformat.NotebookNode, language: str) -> nbformat.NotebookNode:
    """Return a copy with the text cells of one language, without what differs from run to run for no reason."""
    chosen = copy.deepcopy(notebook)
    chosen.cells = [cell for cell in chosen.cells if cell.metadata.get("lang", language) == language]
    for number, cell in enumerate(chosen.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    chosen.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return chosen


def same_source(one: nbformat.NotebookNode, other: nbformat.NotebookNode) -> bool:
    """Return whether both have the same cells, outputs aside."""
    return [(c.cell_type, c.source) for c in one.cells] == [(c.cell_type, c.source) for c in other.cells]


if __name__ == "__main__":
    main()
