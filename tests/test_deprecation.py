"""Names that moved work at their old places for one release, and say where they are now."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "old", "home", "new"),
    [
        ("qwen_rerank.files", "read_documents", "qwen_rerank.folders", "read_files"),
        ("qwen_rerank.documents", "read_documents", "qwen_rerank.folders", "read_files"),
        ("qwen_rerank.evaluation.files", "read_qrels", "qwen_rerank.documents", "read_qrels"),
        ("qwen_rerank.evaluation.files", "EvalFileError", "qwen_rerank.documents", "FileError"),
    ],
)
def test_an_old_place_gives_the_same_thing_with_a_warning(module, old, home, new):
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now {home}\.{new}"):
        found = getattr(importlib.import_module(module), old)
    assert found is getattr(importlib.import_module(home), new)


def test_an_old_place_has_nothing_else():
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from qwen_rerank.files import nothing  # noqa: F401
