"""How much code there is, how often a document is read on its way through it, and what it takes to install and start.

    python eval/size/measure.py [--src TREE] [--installs] [--out FILE]

`TREE` is a checkout of this repository, by default the one that this script lies in; another commit's is measured with
this same script. Prints JSON: statements and files per folder; how many times a document is checked and tokenised on
the three ways in; the seconds of `import qwen_rerank` and `qwen-rerank --help`; with `--installs` the megabytes of
`pip install .` and `pip install '.[all]'` in fresh environments, with torch held by `constraints-cpu.txt` (minutes).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.size.made import ROOT, commit, machine

START_ROUNDS = 9


def main() -> None:
    """Measure a tree and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, default=ROOT, metavar="TREE", help="the checkout to measure")
    parser.add_argument("--installs", action="store_true", help="measure fresh installs too; minutes, and gigabytes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    tree = options.src.resolve()
    report: dict[str, Any] = {
        "command": " ".join(["python eval/size/measure.py", *(["--installs"] if options.installs else [])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(tree),
        "machine": machine(),
        "code": code(tree / "src/qwen_rerank"),
        "reads_per_document": _in_tree(tree, "reads.py"),
        "start_s": start(tree),
    }
    if options.installs:
        report["installs"] = {name: install(tree, name) for name in (".", ".[all]")}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


def code(package: Path) -> dict[str, Any]:
    """Return the statements and files of every folder that has Python files of its own, and of all together."""
    statements: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        folder = path.parent.relative_to(package.parent).as_posix()
        statements[folder] += n_statements(path.read_text())
        files[folder] += 1
    return {
        "statements": statements.total(),
        "files": files.total(),
        "folders": {name: {"statements": statements[name], "files": files[name]} for name in sorted(files)},
    }


def n_statements(source: str) -> int:
    """Return the number of statements of a module, compound ones and their parts each as one; docstrings are none."""
    return sum(isinstance(node, ast.stmt) and not _is_docstring(node) for node in ast.walk(ast.parse(source)))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def start(tree: Path) -> dict[str, float]:
    """Return the median seconds of a process that imports the package, and of the command's help."""
    commands = {
        "python": ["-c", "pass"],
        "import qwen_rerank": ["-c", "import qwen_rerank"],
        "qwen-rerank --help": ["-m", "qwen_rerank", "--help"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 + START_ROUNDS):
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=_environment(tree))
            taken[name].append(time.perf_counter() - begin)
    return {name: round(statistics.median(seconds[1:]), 3) for name, seconds in taken.items()}


def install(tree: Path, name: str) -> dict[str, Any]:
    """Return the megabytes and packages that `pip install NAME` adds to an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin/python"
        packages = next(Path(folder).glob("lib/python*/site-packages"))
        before, n_before = _bytes(packages), len(list(packages.glob("*.dist-info")))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*pip, "-c", tree / "constraints-cpu.txt", name], check=True, cwd=tree)
        return {
            "mb": round((_bytes(packages) - before) / 1e6, 1),
            "packages": len(list(packages.glob("*.dist-info"))) - n_before,
            "torch": any(packages.glob("torch-*.dist-info")),
            "transformers": any(packages.glob("transformers-*.dist-info")),
        }


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _in_tree(tree: Path, script: str) -> Any:
    """Return what a script beside this one prints when it is run with the package of `tree`."""
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment(tree))
    return json.loads(done.stdout)


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree / "src")}


if __name__ == "__main__":
    main()
