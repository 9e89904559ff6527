"""The commands in odd surroundings: optimised, warnings as errors, another locale, no home, a folder that is read-only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What Python itself, or a program that starts another, sets; everything else a lean environment lacks.
_LEAN = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize(
    ("model", "flags", "environment"),
    [
        pytest.param("mini", ["-O"], dict(os.environ), id="without asserts"),
        pytest.param(
            "pocket",
            ["-W", "error", "-W", "ignore:builtin type:DeprecationWarning"],
            dict(os.environ),
            id="warnings are errors",
        ),
        pytest.param("mini", [], {**_LEAN, "LC_ALL": "C"}, id="C locale and no HOME"),
        pytest.param("mini", ["-I"], {**_LEAN, "LC_ALL": "POSIX", "TZ": "Pacific/Kiritimati"}, id="isolated"),
    ],
)
def test_both_rounds_work(tmp_path, model, flags, environment):
    """From files to the final order in `/proc`, where nobody can write."""
    texts, store = tmp_path / "文件", tmp_path / "store"
    texts.mkdir()
    (texts / "键盘.txt").write_text("机械键盘，适合程序员", encoding="utf-8")
    (texts / "apple.txt").write_text("a red apple", encoding="utf-8")
    python = [sys.executable, *flags, "-m", "qwen_rerank"]
    where = {"cwd": "/proc" if Path("/proc").is_dir() else "/", "env": {**environment, **_OFFLINE}}

    subprocess.run(
        [*python, "index", str(texts), "--store", str(store), "-e", "pocket"], **where, check=True, capture_output=True
    )
    searched = subprocess.run(
        [*python, "search", str(store), "程序员的键盘", "-m", model, "--json"],
        **where,
        check=True,
        capture_output=True,
    )

    assert [json.loads(line)["id"] for line in searched.stdout.splitlines()] == ["文件/键盘.txt#1", "文件/apple.txt#1"]
    assert searched.stderr == b""
