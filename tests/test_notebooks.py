"""The committed notebooks are those of their sources, ran without an error, and are the same in both languages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SOURCES = sorted((NOTEBOOKS / "src").glob("*.py"))


def load_build():
    spec = importlib.util.spec_from_file_location("notebooks_build", NOTEBOOKS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()
of_every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def committed(source: Path, language: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / language / f"{source.stem}.ipynb", as_version=4)


def code_cells(source: Path, language: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in committed(source, language).cells if cell.cell_type == "code"]


@of_every_notebook
def test_a_notebook_is_made_from_its_source(source):
    written = jupytext.read(source, fmt="py:percent")
    written.metadata["kernelspec"] = {"name": "python3"}
    for path, notebook in build.languages(written, source, NOTEBOOKS):
        assert build.same_source(path, notebook), f"{path} is stale; run: python notebooks/build.py {source.name[:2]}"


@of_every_notebook
def test_both_languages_have_the_same_code_and_outputs(source):
    english, chinese = code_cells(source, "en"), code_cells(source, "zh")
    assert [(c.source, c.outputs) for c in english] == [(c.source, c.outputs) for c in chinese]


@of_every_notebook
def test_every_cell_ran_and_none_failed(source):
    cells = code_cells(source, "en")
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


# Their subject is the prompt, the engine, or a method that any model shows.
ON_POCKET = {"07_serve_and_call", "08_make_it_fast"}  # about the prompt and the engine of such a model


@of_every_notebook
def test_one_line_takes_it_to_the_real_models(source):
    small = "pocket" if source.stem in ON_POCKET else "mini"
    assert code_cells(source, "en")[0].source.startswith(f'MODEL = "{small}"')


@of_every_notebook
def test_its_text_says_which_small_model_made_the_outputs_and_that_it_is_not_qwen3(source):
    small, other = ("pocket", "mini") if source.stem in ON_POCKET else ("mini", "pocket")
    for language in build.LANGUAGES:
        cells = committed(source, language).cells
        note = next(cell.source for cell in cells if cell.source.startswith(">"))
        assert f"`{small}`" in note
        assert "Qwen3-Reranker" in note
        assert not [cell for cell in cells if f'"{other}"' in cell.source]


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if source.name[:2] not in ("05", "06")], ids=lambda p: p.stem
)
def test_every_picture_names_its_model_and_no_document_by_its_id(source):
    for cell in code_cells(source, "en"):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            names = ("{MODEL}", "both.items()", "published by its authors")  # `both` is keyed by names with the model
            assert any(name in cell.source for name in names)
            assert not re.search(r"(set|annotate|barh|text)\(.*(document\.id|node_id)", cell.source)


@of_every_notebook
def test_nothing_tells_of_the_machine_that_built_it(source):
    printed = [output.get("text", "") for cell in code_cells(source, "en") for output in cell.outputs]
    assert not re.search(r"/(tmp|home|root|Users)/", "\n".join(printed))


@of_every_notebook
def test_it_has_a_small_picture(source):
    picture = NOTEBOOKS / "pictures" / f"{source.stem}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size <= build.MAX_PICTURE_BYTES


def test_no_module_draws_progress_as_a_widget():
    """tqdm.auto warns in every notebook that lacks ipywidgets."""
    sources = (NOTEBOOKS.parent / "src").rglob("*.py")
    assert [path.name for path in sources if re.search(r"tqdm\.(auto|notebook)", path.read_text("utf-8"))] == []


def test_every_notebook_has_a_source():
    written = {path.stem for language in build.LANGUAGES for path in (NOTEBOOKS / language).glob("*.ipynb")}
    assert written == {source.stem for source in SOURCES}


def test_another_model_takes_one_line(tmp_path):
    source = tmp_path / "00_x.py"
    source.write_text('# %%\nMODEL = "pocket"  # the real one: "x/y"\nprint(MODEL)\n')
    notebook = build.execute(source, {"MODEL": "mine", "EMBEDDER": None})
    assert notebook.cells[0].outputs[0].text == "mine\n"
