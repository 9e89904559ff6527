"""What the documentation says is true: its code runs, its commands exist, its pieces are drawn, and both languages have every page."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwen_rerank
from docs import drawing
from docs.build import DOCS, LANGUAGES
from tests.readme_outputs import BY_MINI, READMES, ROOT, small

PAGES = sorted(DOCS.glob("*/**/*.md"))
# Either why a block is not run, or the block and what it is said to print.
_BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
_BEFORE = re.compile(r"<!-- not run: the code before -->\n```python\n(.*?)```", re.DOTALL)
_BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> list[tuple[str, str]]:
    """Return (code, what it is said to print) of every block of a page that is run."""
    return [(code, shown) for unrun, code, shown in _BLOCK.findall(text_of(path)) if not unrun]


def output_of(code: str, names: dict[str, Any]) -> str:
    """Return what a block prints with the small models in place of the real ones, and says so."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(small(code), "<page>", "exec"), names)
    return printed.getvalue() if small(code) == code else f"{BY_MINI}\n{printed.getvalue()}"


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """Give every page the same shipped pair: loading it for each takes longer than all the rest."""
    from qwen_rerank import embedders
    from qwen_rerank.scorers import loading

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((loading, "load_scorer"), (embedders, "load_embedder")):
            once = functools.cache(getattr(module, name))
            patch.setattr(qwen_rerank, name, once)  # first: it looks the name up in the module, and keeps what is there
            patch.setattr(module, name, once)
        yield


@pytest.mark.heavy
@pytest.mark.parametrize("page", [path for path in PAGES if blocks(path)], ids=name_of)
def test_the_code_of_a_page_runs_from_its_first_line_to_its_last(page, tmp_path, monkeypatch, loaded_once):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}

    for code, shown in blocks(page):
        printed = output_of(code, names)
        assert printed.strip()
        assert shown in ("", printed)


def test_the_hubs_client_reads_the_variables_that_the_pages_name(tmp_path):
    named = {name for page in PAGES for name in re.findall(r"\bHF_[A-Z_]+", text_of(page))}
    given = {
        "HF_ENDPOINT": "https://mirror.example",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_x",
    }
    code = (
        "from huggingface_hub import constants as c, get_token; "
        "print(c.ENDPOINT, c.HF_HOME, int(c.HF_HUB_OFFLINE), get_token())"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **given}, capture_output=True, text=True)

    assert named == set(given)
    assert done.stdout.split() == list(given.values())


class _Model:
    """Stands for whatever the code before takes from a package that is not here, and for models from the hub."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Model()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Model()


@pytest.mark.heavy
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_code_before_runs_with_the_packages_that_are_here(language, monkeypatch):
    """Those that are not here, and all models, are stand-ins: what is left is the frameworks' own names and arguments."""
    from langchain_classic.retrievers.document_compressors.cross_encoder import BaseCrossEncoder
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    class CrossEncoder(BaseCrossEncoder):
        def __init__(self, *, model_name: str) -> None: ...

        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
            return [0.0 for _ in text_pairs]

    class Index(InMemoryVectorStore):
        @classmethod
        def load_local(cls, folder: str, embeddings: Any, *, allow_dangerous_deserialization: bool) -> Any:
            return cls(embeddings)

    embeddings = DeterministicFakeEmbedding(size=4)
    for module, names in {
        "langchain_community.cross_encoders": {"HuggingFaceCrossEncoder": CrossEncoder},
        "langchain_community.vectorstores": {"FAISS": Index},
        "langchain_cohere": {"CohereRerank": _Model},
        "rerankers": {"Reranker": _Model},
    }.items():
        made = types.ModuleType(module)
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setitem(sys.modules, "langchain_community", types.ModuleType("langchain_community"))
    monkeypatch.setattr("sentence_transformers.CrossEncoder", _Model)
    given = {"embeddings": embeddings, "task": "t", "query": "q", "docs": ["d"]}
    of_the_card = dict.fromkeys(("process_inputs", "format_instruction", "compute_logits"), _Model())

    code = _BEFORE.findall(text_of(DOCS / language / "coming-from.md"))

    made = [{**given, **of_the_card} for _ in code]
    for one, names in zip(code, made, strict=True):
        exec(compile(one, "<before>", "exec"), names)
    assert len(made) == 5
    assert made[0]["retriever"].invoke("q") == []
    assert (made[1]["reranker"].top_n, made[1]["reranker"].keep_retrieval_score) == (3, True)


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / readme for readme in READMES)], ids=lambda path: path.name)
def test_every_command_of_a_page_exists_with_its_options(page):
    for line in "\n".join(_BASH.findall(text_of(page))).splitlines():
        if line.startswith("qwen-rerank "):
            assert unknown(shlex.split(line, comments=True)[1:]) == [], line


def unknown(words: list[str]) -> list[str]:
    """Return the options of a command line that its command does not have."""
    import typer

    from qwen_rerank.cli import app

    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"no such command: {words}"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words if re.match(r"--?[a-zA-Z]", word) and word not in known]


def test_both_languages_have_every_page():
    english, chinese = (
        {p.relative_to(DOCS / language) for p in PAGES if p.is_relative_to(DOCS / language)} for language in LANGUAGES
    )

    assert english == chinese


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_page_is_in_the_navigation(language):
    listed = re.findall(r"([\w/-]+\.md)$", text_of(DOCS / f"{language}.yml"), re.MULTILINE)

    assert sorted(listed) == sorted(
        p.relative_to(DOCS / language).as_posix() for p in PAGES if p.is_relative_to(DOCS / language)
    )


@pytest.mark.heavy
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_piece_that_a_page_asks_for_is_drawn(page):
    drawn = drawing.drawn(text_of(page), name_of(page)[:2])

    assert "<!-- draw:" not in drawn


@pytest.mark.heavy
@pytest.mark.parametrize("piece", ["cli", "errors", "metrics", "settings"])
def test_chinese_tables_are_chinese_and_nothing_in_them_is_out_of_date(piece):
    """A changed English text of an option has no Chinese one until somebody writes it; a Chinese one that nothing shows goes."""
    drawn = drawing.PIECES[piece]("zh")
    intros = re.findall(r"^## .+\n\n(.+)$", drawn, re.MULTILINE)
    rows = [line.split(" | ") for line in drawn.splitlines() if line.startswith("| `")]
    column = {"errors": 1}.get(piece, -1)
    kinds = ("commands", "options") if piece == "cli" else (piece,)

    assert [line for line in [*intros, *(row[column] for row in rows)] if not re.search(r"[\u4e00-\u9fff]", line)] == []
    assert [
        text for kind in kinds for text in drawing._CHINESE[kind].values() if text.replace("|", "\\|") not in drawn
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_page_leads_to_one(page):
    links = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", text_of(page))

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(("readme", "language"), list(zip(READMES, LANGUAGES, strict=True)))
def test_the_readme_and_the_pages_do_not_say_the_same_in_the_same_words(readme, language):
    """No eight words on end, or twelve characters of Chinese, stand in both; what is drawn from one source is not counted."""
    own, pages = runs_of_words(text_of(ROOT / readme)), set()
    for page in (DOCS / language).rglob("*.md"):
        pages |= runs_of_words(text_of(page))

    assert len(own) > 500
    assert own & pages == set()


def test_words_that_stand_twice_would_be_noticed():
    """Whatever stands around them, in both languages."""
    twice = "texts stay where they are and nobody reads"
    assert runs_of_words(f"Before, {twice} them.") & runs_of_words(f"- **Mine**: {twice} along") == {
        tuple(twice.split())
    }
    assert runs_of_words("前面，文本留在原处别人读不到它。") & runs_of_words("* 文本留在原处，别人读不到它！") == {
        tuple("文本留在原处别人读不到它")
    }


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """Return every eight words on end, and every twelve of which half are Chinese characters, of a page's prose."""
    prose = re.sub(r"```.*?```|<!-- (\w+) -->.*?<!-- /\1 -->|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)|[`*\[\]]", "", prose)
    found = set()
    for part in re.split(r"\n\n|\n[-|*]", prose):
        words = re.findall(r"[\u4e00-\u9fff]|[a-z0-9'./_-]*[a-z0-9]", part.lower())
        for first in range(len(words)):
            n_chinese = sum("\u4e00" <= word <= "\u9fff" for word in words[first : first + 12])
            run = words[first : first + (12 if n_chinese >= 6 else 8)]
            if len(run) == 12 or (len(run) == 8 and n_chinese < 6):
                found.add(tuple(run))
    return found
