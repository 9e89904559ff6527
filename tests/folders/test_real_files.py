"""A folder of more than five hundred files as they come: what this environment's packages bring, and office files made here."""

from __future__ import annotations

import os
import shutil
import sysconfig
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from qwen_rerank.folders import sync_folder
from qwen_rerank.folders.walk import shown
from qwen_rerank.store import FaissStore
from tests.folders import files

PACKAGES = Path(sysconfig.get_path("purelib"))
REPOSITORY = Path(__file__).resolve().parents[2]
_MOST_BYTES = 6_000  # so that it takes seconds
WANTED = {  # most of each kind, so that no environment makes it slow
    "*.md": 60, "*.rst": 25, "LICEN*": 160, "METADATA": 60, "*.html": 40, "*.csv": 5, "*.py": 250, "*.js": 10, "*.css": 5,
    "py.typed": 3, "*.png": 5, "*.so": 3, "*.json": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder; a name tells the package that a file is from."""
    root = tmp_path_factory.mktemp("real") / "文件"
    for pattern, paths in by_pattern().items():
        for path in paths[:: len(paths) // WANTED[pattern] + 1]:
            copy(path, root / path.relative_to(PACKAGES))
    for path in sorted((REPOSITORY / "notebooks").glob("*/*.ipynb")):
        copy(path, root / "notebooks" / path.relative_to(REPOSITORY / "notebooks"))
    (root / "办公").mkdir()
    files.office(root / "办公")
    return root


def by_pattern():
    """Return every small file of the packages below the pattern that it fits."""
    found = {pattern: [] for pattern in WANTED}
    for folder, below, names in os.walk(PACKAGES):
        below.sort()
        for name in sorted(names):
            pattern = next((pattern for pattern in WANTED if fnmatchcase(name, pattern)), None)
            path = Path(folder, name)
            if pattern is not None and path.is_file() and path.stat().st_size < _MOST_BYTES:
                found[pattern].append(path)
    return found


def copy(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def names(folder):
    return {f"文件/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}


def below(name, skipped):
    """Return whether a folder above a file was left out as a whole."""
    parts = name.split("/")
    return any("/".join(parts[:n]) + "/" in skipped for n in range(1, len(parts)))


def found(store, query, top_k=30):
    return [hit.document.metadata["source"] for hit in store.search(query, top_k)]


def test_five_hundred_real_files_are_indexed_searched_changed_and_searched_again(folder, tmp_path):
    with FaissStore.create(tmp_path / "store", None) as store:
        report = sync_folder(store, [folder])
        skipped = {one.where: one.reason for one in report.skipped}
        left_out = {name for name in names(folder) if name in skipped or below(name, skipped)}

        assert {one.source for one in report.files} | left_out == names(folder)
        assert len(report.files) + len(left_out) == len(names(folder))
        assert all(one.kind and one.passages for one in report.files)
        assert len(report.files) >= 500
        assert all(reason for reason in skipped.values())

        # Every format answers in both languages.
        for stem, (_, text) in (("租约", files.ZH), ("lease", files.EN)):
            suffixes = {Path(source).suffix for source in found(store, text) if Path(source).stem == stem}
            assert suffixes == {".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".ipynb", ".html"}
        assert any(source.startswith("文件/notebooks/zh") for source in found(store, "重排 模型 文档"))
        assert any("LICEN" in source for source in found(store, "permission is hereby granted free of charge"))

        licences = sorted(folder.rglob("LICEN*"))
        for path in licences[:40]:
            path.unlink()
        licences[40].write_text("The quokka signs in Perth.", encoding="utf-8")
        (folder / "办公" / "租约.pdf").rename(folder / "办公" / "合同.pdf")
        files.word(folder / "办公" / "新.docx", "袋鼠", "袋鼠在珀斯签字。")
        again = sync_folder(store, [folder]).counts

        assert (again["added"], again["changed"], again["deleted"]) == (2, 1, 41)
        assert again["unchanged"] == len(report.files) - 42
        assert found(store, "quokka Perth", 1) == [f"文件/{shown(str(licences[40].relative_to(folder)))}"]
        assert found(store, "袋鼠 签字", 1) == ["文件/办公/新.docx"]
        renamed = found(store, files.ZH[1])
        assert "文件/办公/合同.pdf" in renamed
        assert "文件/办公/租约.pdf" not in renamed
        assert store.verify().ok
