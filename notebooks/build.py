"""Make the notebooks: one source of code cells, an English and a Chinese text around them.

    python notebooks/build.py              # execute all, write notebooks/en, notebooks/zh and notebooks/pictures
    python notebooks/build.py 01 05        # only these
    python notebooks/build.py --check      # execute all, write nothing, fail if a committed notebook is not made from its source
    python notebooks/build.py --out mine --model Qwen/Qwen3-Reranker-0.6B --embedder Qwen/Qwen3-Embedding-0.6B

A source in notebooks/src is a script in jupytext's percent format. Its markdown cells carry `lang="en"` or `lang="zh"`; a cell
without a language goes into both. The code runs once, in an empty folder, and both notebooks get the same outputs. The image of
a cell with `picture=true` becomes the notebook's picture.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
TIMEOUT_S = 600
MAX_PICTURE_BYTES = 60_000


def main() -> None:
    """Execute the sources and write or check the notebooks."""
    arguments = read_arguments()
    names = {"MODEL": arguments.model, "EMBEDDER": arguments.embedder}
    # The kernel finds this environment's commands first, and no notebook may reach for the network.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if set(names.values()) == {None}:
        os.environ["HF_HUB_OFFLINE"] = "1"
    sources = [p for p in sorted((HERE / "src").glob("*.py")) if not arguments.only or p.name[:2] in arguments.only]
    stale = []
    for source in tqdm(sources, desc="notebooks", disable=None):
        executed = execute(source, names)
        if arguments.check:
            stale += [path for path, notebook in languages(executed, source, HERE) if not same_source(path, notebook)]
        else:
            write(executed, source, arguments.out)
    if stale:
        sys.exit(f"not made from their sources: {', '.join(map(str, stale))}; run: python notebooks/build.py")
    print(f"{len(sources)} notebooks executed in both languages")


def read_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Make the notebooks from their sources.")
    parser.add_argument("only", nargs="*", help="numbers, e.g. 01 05")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a committed notebook differs from its source"
    )
    parser.add_argument("--model", help="run with this reranker instead of the one in the source")
    parser.add_argument("--embedder", help="run with this embedder instead of the one in the source")
    parser.add_argument("--out", type=Path, default=HERE, help="where the notebooks go")
    arguments = parser.parse_args()
    if (arguments.model or arguments.embedder) and (arguments.check or arguments.out == HERE):
        parser.error("other models make other outputs; give them a folder of their own with --out, without --check")
    return arguments


def execute(source: Path, names: dict[str, str | None]) -> nbformat.NotebookNode:
    """Return the source as a notebook with its outputs; `names` are the constants that get another value."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for cell in notebook.cells:
        for name, value in names.items():
            if value is not None and cell.cell_type == "code":
                cell.source = re.sub(rf'^{name} = ".*?"', f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            forget_folder(cell, folder)
    return notebook


def forget_folder(cell: nbformat.NotebookNode, folder: str) -> None:
    """Take the temporary folder's name, which differs in every run, out of a cell's printed outputs."""
    for output in cell.get("outputs", []):
        if "text" in output:
            output.text = output.text.replace(f"{folder}/", "")


def write(executed: nbformat.NotebookNode, source: Path, out: Path) -> None:
    """Write the notebook in both languages, and its picture."""
    for path, notebook in languages(executed, source, out):
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    picture = picture_of(executed)
    if len(picture) > MAX_PICTURE_BYTES:
        sys.exit(f"the picture of {source.name} has {len(picture)} bytes; {MAX_PICTURE_BYTES} is the most")
    path = out / "pictures" / f"{source.stem}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture)


def languages(executed: nbformat.NotebookNode, source: Path, out: Path) -> list[tuple[Path, nbformat.NotebookNode]]:
    """Return where the notebook goes in each language, and what goes there."""
    return [(out / language / f"{source.stem}.ipynb", in_language(executed, language)) for language in LANGUAGES]


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


def picture_of(notebook: nbformat.NotebookNode) -> bytes:
    """Return the image of the cell that is marked as the notebook's picture, as a small PNG."""
    [cell] = [cell for cell in notebook.cells if cell.metadata.get("picture")]
    [encoded] = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB").quantize(64)
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def same_source(path: Path, notebook: nbformat.NotebookNode) -> bool:
    """Return whether the file has the notebook's cells, outputs aside."""
    if not path.is_file():
        return False
    there = nbformat.read(path, as_version=4)
    return [(c.cell_type, c.source) for c in there.cells] == [(c.cell_type, c.source) for c in notebook.cells]


if __name__ == "__main__":
    main()
