from __future__ import annotations

import errno
import re
from importlib import metadata

import pytest

from qwen_rerank.errors import MissingExtraError
from qwen_rerank.extras import pip_line
from qwen_rerank.store import FaissWheelsError, faiss_wheels
from qwen_rerank.store.faiss_build import load_faiss


def install(monkeypatch, **versions):
    def version(name):
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(metadata, "version", version)


def test_the_installed_wheel_is_named():
    assert len(faiss_wheels()) == 1


def test_two_wheels_at_once_are_refused_with_the_cure(monkeypatch):
    install(monkeypatch, faiss_cpu="1.15.1", faiss_gpu="1.15.1")

    cure = re.escape(f"pip uninstall -y faiss-cpu faiss-gpu && {pip_line('faiss-gpu')}")
    with pytest.raises(FaissWheelsError, match=cure):
        load_faiss()
    assert faiss_wheels() == {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}


def test_a_missing_faiss_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)

    with pytest.raises(MissingExtraError, match=re.escape(pip_line("faiss-cpu"))):
        load_faiss()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")]
)
def test_a_wheel_whose_description_cannot_be_read_works_all_the_same(monkeypatch, error):
    def version(name):
        raise error

    monkeypatch.setattr("importlib.metadata.version", version)

    assert faiss_wheels() == {}
    assert load_faiss().IndexFlatIP
