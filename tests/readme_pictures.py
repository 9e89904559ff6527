"""The READMEs' pictures of the examples: what each prints, as a drawing. `python -m tests.readme_pictures` draws them anew."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.cells import cell_len, set_cell_size

from tests.readme_outputs import ROOT, output

EXAMPLES = ROOT / "examples"
PICTURES = EXAMPLES / "pictures"
COLUMNS = 80  # longer lines are cut

# Of each example's output the line to begin with, and how many: no ports and times, which change from run to run.
SHOWN = {
    "search_a_folder": ("", 9),
    "langchain_rerank": ("", 8),
    "llama_index_rerank": ("", 5),
    "over_any_retriever": ("", 11),
    "cascade": ("", 9),
    "long_contracts": ("", 8),
    "evaluate_your_corpus": ("", 9),
    "serve_and_call": ("POST", 7),
    "finetune_on_your_data": ("reranker: ", 5),
}
SLOW = frozenset({"finetune_on_your_data"})  # trains a model

_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Menlo, Consolas, 'DejaVu Sans Mono', monospace" font-size="15">
<rect width="100%" height="100%" rx="8" fill="#1e2329"/>
<text x="16" y="28" fill="#7d8794" xml:space="preserve">{title}</text>
{lines}
</svg>
"""
_LINE = '<text x="16" y="{y}" fill="#e3e7ec" xml:space="preserve">{text}</text>'


def path_of(name: str) -> Path:
    """Return where an example's picture is kept."""
    return PICTURES / f"{name}.svg"


def picture(name: str) -> str:
    """Return a drawing of what an example prints."""
    with TemporaryDirectory() as folder:
        printed = output([sys.executable, str(EXAMPLES / f"{name}.py")], Path(folder)).splitlines()
    beginning, count = SHOWN[name]
    start = next(i for i, line in enumerate(printed) if line.startswith(beginning))
    return drawn(f"$ python examples/{name}.py", printed[start : start + count])


def drawn(title: str, lines: list[str]) -> str:
    """Return lines of a terminal as SVG."""
    shown = [_LINE.format(y=56 + 22 * i, text=escape(cut(line))) for i, line in enumerate(lines) if line.strip()]
    height = 50 + 22 * len(lines)
    return _SVG.format(width=32 + 9 * COLUMNS, height=height, title=escape(title), lines="\n".join(shown))


def cut(line: str) -> str:
    """Return a line no wider than a picture."""
    return line if cell_len(line) <= COLUMNS else set_cell_size(line, COLUMNS - 1).rstrip() + "…"


def draw(names: list[str]) -> None:
    """Write the pictures of these examples."""
    PICTURES.mkdir(exist_ok=True)
    for name in names:
        path_of(name).write_text(picture(name), encoding="utf-8")


if __name__ == "__main__":
    draw(sys.argv[1:] or list(SHOWN))
