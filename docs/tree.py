"""The tree: one line for every file to read, drawn from the first line of every module; `python -m docs.tree` prints it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_WIDTH = 38
_FOLDERS = (
    f"{'docs/':<{_WIDTH}} The pages in en/ and zh/; build.py makes the site of them, drawing.py what is not typed by hand.",
    f"{'notebooks/':<{_WIDTH}} Eight lessons: their sources in src/, executed in en/ and zh/ by build.py.",
    f"{'tests/':<{_WIDTH}} Laid out as the package is; reference.py is the model card's recipe, slow and obvious.",
)


def tree() -> str:
    """Return one line for every file to read: the package, the examples, the measurements, and the folders beside them."""
    return "\n".join([*_package(), "", *_scripts("examples"), "", *_scripts("eval"), "", *_FOLDERS])


def _package() -> list[str]:
    lines = ["src/qwen_rerank/"]
    package = ROOT / "src" / "qwen_rerank"
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent != package, p.parent, p.name)):
        relative = path.relative_to(package)
        name, depth = relative.name, len(relative.parts)
        if name == "__init__.py" and depth > 1:
            name, depth = f"{relative.parts[-2]}/", depth - 1
        lines.append(_line("    " * depth + name, subject(path)))
    return lines


def _scripts(folder: str) -> list[str]:
    """Return the lines of a folder of scripts, those in its own folders after its own."""
    paths = sorted((ROOT / folder).rglob("*.py"), key=lambda p: (len(p.parts), p))
    return [f"{folder}/", *[_line(f"    {p.relative_to(ROOT / folder).as_posix()}", subject(p)) for p in paths]]


def _line(label: str, words: str) -> str:
    return f"{label:<{_WIDTH}} {words}"


def subject(path: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").split("\n")[0]


if __name__ == "__main__":
    print(tree())
