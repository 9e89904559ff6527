"""One name, one thing: classes and modules of the package can be told apart by their names."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import qwen_rerank

ROOT = Path(qwen_rerank.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Both frameworks' users find these under the same name.
ADAPTERS = {"QwenRerankRetriever", "QwenVectorStore"}
# The same job in each room: its errors, its settings, its scorer, its network.
ALIKE = {"__init__", "errors", "settings", "scorer", "model"}
# Old places of names that have moved, which go away with the next release.
MOVED = {"files.py", "evaluation/files.py"}
MOST_LINES = 450
RIDDLES = ("What ", "Which ", "How ", "Where ", "Who ", "Why ", "When ")


def test_no_two_classes_share_a_name():
    homes = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(path.relative_to(ROOT).as_posix())

    assert {name: found for name, found in homes.items() if len(found) > 1 and name not in ADAPTERS} == {}


def test_no_two_modules_with_unlike_jobs_share_a_name():
    homes = defaultdict(list)
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if path.stem not in ALIKE and name not in MOVED:
            homes[path.stem].append(name)

    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_no_file_is_too_long_to_be_read():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}

    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_first_line_says_what_a_thing_is(path):
    """Of the module and of everything in it: never a question that only the code answers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef))]
    lines = [(ast.get_docstring(node) or "").split("\n")[0] for node in documented]

    assert [line for line in lines if line.startswith(RIDDLES)] == []
