"""What the READMEs show is true: the code, its output, the figures, and the same code in both languages."""

from __future__ import annotations

import re
import runpy

import pytest

from docs.tree import subject
from tests.readme_outputs import READMES, ROOT, answer, demo, files, run, snippets
from tests.readme_pictures import EXAMPLES, SHOWN

DRAWN = runpy.run_path(str(ROOT / "eval" / "readme.py"))
LANGUAGES = DRAWN["READMES"]


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", READMES)
def test_it_can_be_read_in_two_minutes(readme):
    assert len(text_of(readme).splitlines()) <= 200


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


@pytest.mark.heavy
@pytest.mark.parametrize("readme", READMES)
def test_the_search_of_a_folder_finds_what_is_shown(readme):
    assert files(text_of(readme)) in text_of(readme)


def test_every_example_has_a_picture():
    assert sorted(SHOWN) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_both_languages_show_the_same_code():
    without_comments = [[re.sub(r"\s*#.*", "", code) for code, _ in snippets(text_of(readme))] for readme in READMES]

    assert without_comments[0] == without_comments[1]


@pytest.mark.parametrize("readme", READMES)
def test_the_figures_are_those_of_the_committed_results(readme):
    text = text_of(readme)

    assert DRAWN["with_figures"](text, LANGUAGES[readme]) == text, "run: python eval/readme.py"


def test_the_pictures_are_those_of_the_committed_results():
    stale = [path.name for path, text in DRAWN["pictures"]().items() if path.read_text(encoding="utf-8") != text]

    assert stale == [], "run: python eval/readme.py"


@pytest.mark.parametrize("readme", READMES)
def test_every_link_to_a_file_leads_somewhere(readme):
    links = re.findall(r"(?:\]\(|srcset=\"|src=\")([^)#:\"]+)[)\"]", text_of(readme))

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
