"""The README's tree, drawn from the first line of every module: `python tests/readme_tree.py` writes it into both READMEs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
_PLACE = re.compile(r"(<!-- tree -->\n```\n).*?(\n```\n<!-- /tree -->)", re.DOTALL)
_WIDTH = 38


def tree() -> str:
    """Return one line for every module of the package."""
    lines = ["src/qwen_rerank/"]
    package = ROOT / "src" / "qwen_rerank"
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent != package, p.parent, p.name)):
        relative = path.relative_to(package)
        if relative.name == "__init__.py":
            name = f"{relative.parent.as_posix()}/" if relative.parent != Path() else "__init__.py"
            depth = len(relative.parts) - 2
        else:
            name, depth = relative.name, len(relative.parts) - 1
        label = "    " * (max(depth, 0) + 1) + (
            name if depth <= 0 else name.split("/")[-2] + "/" if name.endswith("/") else name
        )
        lines.append(f"{label:<{_WIDTH}} {subject(path)}")
    return "\n".join(lines)


def subject(path: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").split("\n")[0]


def with_tree(text: str) -> str:
    """Return a README with its tree as it is now."""
    return _PLACE.sub(lambda match: match[1] + tree() + match[2], text)


if __name__ == "__main__":
    for readme in READMES:
        path = ROOT / readme
        path.write_text(with_tree(path.read_text(encoding="utf-8")), encoding="utf-8")
