"""What the READMEs show is true: the tree, the code, its output, and the same code in both languages."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.readme_tree import READMES, ROOT, subject, with_tree

_PYTHON = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)
_SMALL = {
    '"Qwen/Qwen3-Reranker-0.6B"': '"pocket"',
    '"Qwen/Qwen3-Embedding-0.6B"': '"pocket"',
    "QwenScorer()": 'QwenScorer("pocket")',
}


def snippets(readme):
    """Return (code, shown output or "") of every Python block; blocks that need a running server say so and are left out."""
    blocks = _PYTHON.findall((ROOT / readme).read_text(encoding="utf-8"))
    return [(code, output) for code, output in blocks if "http://" not in code]


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_is_the_packages(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")

    assert text == with_tree(text), "run: python tests/readme_tree.py"


def test_every_module_says_what_it_is_for():
    modules = (ROOT / "src" / "qwen_rerank").rglob("*.py")

    assert [str(path) for path in modules if not subject(path).rstrip("`").endswith((".", "`", "?"))] == []


@pytest.mark.heavy
@pytest.mark.parametrize(("code", "output"), [pytest.param(*s, id=str(i)) for i, s in enumerate(snippets("README.md"))])
def test_the_code_runs_and_prints_what_is_shown(code, output, tmp_path):
    for name, small in _SMALL.items():
        code = code.replace(name, small)

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    if output:
        assert done.stdout == output


def test_both_languages_show_the_same_code():
    without_comments = [[re.sub(r"\s*#.*", "", code) for code, _ in snippets(readme)] for readme in READMES]

    assert without_comments[0] == without_comments[1]


@pytest.mark.parametrize("readme", [*READMES, "CONTRIBUTING.md"])
def test_every_link_to_a_file_leads_somewhere(readme):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / readme).read_text(encoding="utf-8"))

    assert [link for link in links if not (ROOT / link).exists()] == []
