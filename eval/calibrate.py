"""Write down what `eval calibrate` prints of the shipped encyclopedia, for the page on thresholds.

    python eval/calibrate.py

Fits `mini` to the 60 questions in each language, the first ten candidates of BM25, and writes
`eval/results/calibrate.en.txt` and `eval/results/calibrate.zh.txt`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen_rerank.samples import LANGUAGES, load_encyclopedia

RESULTS = Path(__file__).parent / "results"
COMMAND = "qwen-rerank eval calibrate encyclopedia --labels labels.jsonl -f bm25 -m mini --depth 10 --precision 0.9 --save calibration.json"


def main() -> None:
    """Write the collections, and what the command says of them."""
    for language in LANGUAGES:
        sample = load_encyclopedia(language)
        documents = [{"id": document.id, "text": document.text} for document in sample.documents]
        labels = [{"query": text, "relevant": [sample.relevant[text]]} for text in sample.queries]
        with TemporaryDirectory() as folder:
            for name, rows in (("encyclopedia/documents.jsonl", documents), ("labels.jsonl", labels)):
                path = Path(folder) / name
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            command = [sys.executable, "-m", "qwen_rerank", *COMMAND.split()[1:]]
            printed = subprocess.run(
                command, cwd=folder, env={**os.environ, "COLUMNS": "120"}, capture_output=True, text=True, check=True
            ).stdout
        lines = [f"$ {COMMAND}", *(line.rstrip() for line in printed.splitlines())]
        (RESULTS / f"calibrate.{language}.txt").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
