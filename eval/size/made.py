"""A small checkpoint and texts of a known length, made on the spot, and what a report says about where it was measured."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_SHIPPED = ROOT / "src/qwen_rerank/pocket/reranker"  # its tokenizer is a real one, of 12,000 tokens


def make_model(folder: Path, *, layers: int) -> Path:
    """Write a Qwen3-Reranker checkpoint with random weights and the shipped tokenizer; needs `qwen_rerank` and torch."""
    from tests.checkpoints import make_checkpoint

    vocabulary = json.loads((_SHIPPED / "config.json").read_text())["vocab_size"]
    return make_checkpoint(folder, layers=layers, tokenizer_dir=_SHIPPED, vocabulary=vocabulary)


def documents(n: int, *, seed: int, tokens: int | None = None, chars: int | None = None) -> dict[str, str]:
    """Return `n` distinct texts of so many tokens or characters by the word that each begins with and no other holds."""
    chance = random.Random(seed)
    words, sizes = _words()
    made = {}
    for number in range(n):
        mark = f"mark{seed}x{number}x"
        text = [mark]
        if tokens is not None:
            missing = tokens - len(_tokenizer().encode(mark, add_special_tokens=False))
            while missing > 0:
                word = chance.choice(words)
                if sizes[word] <= missing:
                    text.append(word)
                    missing -= sizes[word]
        while chars is not None and sum(map(len, text)) < chars:
            text += chance.choices(words, k=100)
        made[mark] = "".join(text)[:chars]
    found = {len(encoding) for encoding in _tokenizer().encode_batch(list(made.values()), add_special_tokens=False)}
    if tokens is not None and found != {tokens}:
        raise SystemExit(f"documents came out with {sorted(found)} tokens, not {tokens}.")
    return made


def machine() -> dict[str, Any]:
    """Return the hardware, how busy it is, and the versions of what is measured on it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    packages = ("torch", "tokenizers", "numpy", "fastapi", "uvicorn", "typer")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def commit(tree: Path) -> str:
    """Return the commit that a checkout stands at, "-dirty" where it was changed since."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout.strip() or "unknown"


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(_SHIPPED / "tokenizer.json"))


@cache
def _words() -> tuple[list[str], dict[str, int]]:
    """Return words, a space before each, and the tokens of each: some are one token, some are new to any tokenizer."""
    chance = random.Random(0)
    known = sorted(token[1:] for token in _tokenizer().get_vocab() if re.fullmatch("Ġ[a-z]{2,}", token))
    made = ["".join(chance.sample(known, 2)) for _ in range(len(known) // 2)]
    words = [f" {word}" for word in (*known, *made)]
    encodings = _tokenizer().encode_batch(words, add_special_tokens=False)
    return words, {word: len(encoding) for word, encoding in zip(words, encodings, strict=True)}
