"""Names that moved work at their old places for one release, and say where they are now."""

from __future__ import annotations

import importlib

import pytest

from qwen_rerank import documents


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("qwen_rerank.files", "read_documents", "read_documents"),
        ("qwen_rerank.files", "SUFFIXES", "SUFFIXES"),
        ("qwen_rerank.evaluation.files", "read_qrels", "read_qrels"),
        ("qwen_rerank.evaluation.files", "EvalFileError", "FileError"),
    ],
)
def test_an_old_place_gives_the_same_thing_with_a_warning(module, old, new):
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now qwen_rerank\.documents\.{new}"):
        found = getattr(importlib.import_module(module), old)
    assert found is getattr(documents, new)


def test_an_old_place_has_nothing_else():
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from qwen_rerank.files import nothing  # noqa: F401
