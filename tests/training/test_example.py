"""The example of fine-tuning runs as it is: from no argument at all, and on a collection of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.examples
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune_on_your_data.py"


def run(folder: Path, *arguments: str) -> str:
    """Return what the example prints, started in `folder`."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fine_tuning_runs_as_it_is(tmp_path):
    printed = run(tmp_path, "--epochs", "1")

    assert "36 questions to train on, 36 to test on" in printed
    assert "gain of the training: " in printed
    assert (tmp_path / "my-reranker" / "model.safetensors").is_file()


def test_fine_tuning_takes_your_own_collection(tmp_path):
    texts = {f"d{i}": f"the {colour} {thing}" for i, (colour, thing) in enumerate(
        (colour, thing) for colour in ("red", "blue", "green") for thing in ("apple", "boat", "chair", "door")
    )}  # fmt: skip
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        "\n".join(f'{{"_id": "{i}", "title": "", "text": "{text}"}}' for i, text in texts.items())
    )
    (tmp_path / "queries.jsonl").write_text(
        "\n".join(f'{{"_id": "q{i}", "text": "{text}"}}' for i, text in texts.items())
    )
    for split, part in (("train", list(texts)[:8]), ("test", list(texts)[8:])):
        rows = "".join(f"q{i}\t{i}\t1\n" for i in part)
        (tmp_path / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")

    printed = run(tmp_path, str(tmp_path), "--epochs", "1", "--output", str(tmp_path / "tuned"))

    assert "8 questions to train on, 4 to test on" in printed
