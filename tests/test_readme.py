"""What the READMEs show is true: the tree, the code, its output, and the same code in both languages."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.readme_outputs import answer, demo, run, snippets
from tests.readme_pictures import EXAMPLES, SHOWN
from tests.readme_tree import READMES, ROOT, subject, with_tree


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_is_the_packages(readme):
    text = text_of(readme)

    assert text == with_tree(text), "run: python tests/readme_tree.py"


def test_every_module_says_what_it_is_for():
    modules = (ROOT / "src" / "qwen_rerank").rglob("*.py")

    assert [str(path) for path in modules if not subject(path).rstrip("`").endswith((".", "`", "?"))] == []


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("code", "shown"), [pytest.param(*s, id=str(i)) for i, s in enumerate(snippets(text_of("README.md")))]
)
def test_the_code_runs_and_prints_what_is_shown(code, shown, tmp_path):
    assert run(code, tmp_path) == shown


@pytest.mark.heavy
def test_the_demo_and_the_servers_answer_are_what_is_shown():
    expected = (demo(), answer(text_of("README.md")))

    assert [all(part in text_of(readme) for part in expected) for readme in READMES] == [True, True]


@pytest.mark.parametrize("readme", READMES)
def test_every_example_has_its_link_and_picture(readme):
    shown = re.findall(r"\[!\[\]\(examples/pictures/(\w+)\.svg\)\]\(examples/\1\.py\)", text_of(readme))

    assert sorted(shown) == sorted(SHOWN) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_both_languages_show_the_same_code():
    without_comments = [[re.sub(r"\s*#.*", "", code) for code, _ in snippets(text_of(readme))] for readme in READMES]

    assert without_comments[0] == without_comments[1]


def test_the_figures_are_those_of_the_committed_results():
    drawn = runpy.run_path(str(ROOT / "eval" / "readme.py"))

    for readme, language in drawn["READMES"].items():
        assert drawn["with_figures"](text_of(readme), language) == text_of(readme), "run: python eval/readme.py"


@pytest.mark.parametrize("readme", [*READMES, "CONTRIBUTING.md"])
def test_every_link_to_a_file_leads_somewhere(readme):
    links = re.findall(r"\]\(([^)#:]+)\)", text_of(readme))

    assert [link for link in links if not (ROOT / link).exists()] == []
