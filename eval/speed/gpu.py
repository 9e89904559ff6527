"""The GPU tests and the benchmark in one command, from the source tree, without network or installation.

    python eval/speed/gpu.py --tokenizer FOLDER --out FOLDER [--size 0.6B | 4B | 8B] [--no-tests]

Needs Python 3.12, PyTorch with CUDA, transformers, sentence-transformers and pytest. Weights of the true shape are made on
the device. One size is one part, each meant to take less than 10 minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the tests, then the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the official tokenizer files")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for JSON and plot")
    parser.add_argument("--size", default="0.6B", choices=["0.6B", "4B", "8B"])
    parser.add_argument("--no-tests", action="store_true", help="only the benchmark, for the second and third part")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "QWEN_RERANK_TOKENIZER": str(options.tokenizer.resolve()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    tests = ["-m", "pytest", "-m", "gpu", "-q", str(ROOT / "tests/scorers/qwen/test_gpu.py")]
    # One turn, to be short; the JSON says so.
    bench = [str(ROOT / "eval/speed/bench.py"), "--device", "cuda", "--size", options.size, "--turns", "1"]
    bench += ["--tokenizer", str(options.tokenizer), "--out", str(options.out / f"gpu-{options.size}.json")]
    commands = [bench] if options.no_tests else [tests, bench]
    codes = [
        subprocess.run([sys.executable, *command], env=environment, check=False).returncode for command in commands
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
