"""Every example runs as it is, from any folder, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme_pictures import EXAMPLES, SHOWN, SLOW, path_of, picture

pytestmark = pytest.mark.examples


def run(name: str, folder: Path, *arguments: str) -> str:
    """Return what an example prints, started in `folder`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(SHOWN.keys() - SLOW))  # tests/training runs the slow one
def test_an_example_runs_as_it_is_and_prints_what_its_picture_shows(name):
    assert picture(name) == path_of(name).read_text(encoding="utf-8"), f"run: python -m tests.readme_pictures {name}"


def test_searching_a_folder_again_embeds_only_what_changed(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "lease.md").write_text("The lease ends in June.")
    (notes / "dog.md").write_text("The dog eats at six.")
    arguments = (str(notes), "when does the lease end", "--store", str(tmp_path / "store"))
    assert "2 passages in the store, 2 of them new" in run("search_a_folder.py", tmp_path, *arguments)

    (notes / "dog.md").write_text("The dog eats at seven.")
    assert "2 passages in the store, 1 of them new" in run("search_a_folder.py", tmp_path, *arguments)


def test_evaluating_takes_your_own_documents_and_labels(tmp_path):
    (tmp_path / "docs.jsonl").write_text(
        "\n".join(f'{{"id": "d{i}", "text": "{text}"}}' for i, text in enumerate(["a red apple", "a blue sea"]))
    )
    (tmp_path / "labels.jsonl").write_text(
        '{"query": "red apple", "relevant": ["d0"]}\n{"query": "blue sea", "relevant": ["d1"]}\n'
    )
    printed = run("evaluate_your_corpus.py", tmp_path, "--documents", "docs.jsonl", "--labels", "labels.jsonl")
    assert "labels: 2 documents, 2 questions" in printed
