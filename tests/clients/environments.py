"""Environments of real client packages: one folder for packages that go together, made once and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The pins are the tried versions, which the READMEs' table repeats. Packages that cannot share an environment stand
# apart: langchain-cohere wants cohere < 6, LlamaIndex < 7, the SDK itself is at 7; infinity-client wants httpx < 0.28.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "cohere": ("cohere==7.3.1",),
    "litellm": ("litellm==1.106.2",),
    "llama_index": (
        "llama-index-postprocessor-cohere-rerank==0.10.0",
        "llama-index-postprocessor-jinaai-rerank==0.6.0",
        "llama-index-postprocessor-siliconflow-rerank==0.5.0",
        "llama-index-postprocessor-tei-rerank==0.6.0",
        "llama-index-postprocessor-xinference-rerank==0.5.0",
        "llama-index-postprocessor-nvidia-rerank==0.7.0",
    ),
    "langchain": ("langchain-cohere==0.6.0", "langchain-voyageai==0.4.1", "langchain-nvidia-ai-endpoints==1.5.0"),
    "langchain_community": ("langchain-community==0.4.2", "infinity-client==0.0.78"),
    "haystack": ("cohere-haystack==11.0.0", "jina-haystack==2.0.1", "huggingface-api-haystack==3.1.0"),
    "plain": ("voyageai==0.5.0", "xinference-client==4.1.0", "rerankers==0.10.0", "agno==3.1.10", "cohere==7.3.1"),
}


def cache_folder() -> Path:
    """Return where the environments are kept: `$QWEN_RERANK_CLIENTS`, else `build/clients`."""
    given = os.environ.get("QWEN_RERANK_CLIENTS")
    return Path(given) if given else ROOT / "build" / "clients"


def python_of(group: str) -> Path:
    """Return the interpreter of a group's environment."""
    return python_in(cache_folder() / group, REQUIREMENTS[group])


def python_in(folder: Path, requirements: Sequence[str], *, without: Sequence[str] = ()) -> Path:
    """Return an environment's interpreter; make the environment where it is absent or was made for other versions.

    Args:
        folder: Where it is kept.
        requirements: What is installed.
        without: What is removed afterwards.
    """
    stamp = folder / "made-for"
    wanted = hashlib.sha256("\n".join((sys.version, *requirements, *without)).encode()).hexdigest()
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-qq", "-c", ROOT / "constraints-cpu.txt", *requirements], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "-qq", "-y", *without], check=True)
        stamp.write_text(wanted)
    return python


def main() -> None:
    """Make the environments named on the command line, or all."""
    for group in sys.argv[1:] or REQUIREMENTS:
        print(group, python_of(group), flush=True)


if __name__ == "__main__":
    main()
