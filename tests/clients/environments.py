"""Environments of real client packages, one folder each, made once and kept in a cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "cohere": ("cohere==7.3.1",),
    "langchain-cohere": ("langchain-cohere==0.6.0",),
    "litellm": ("litellm==1.106.2",),
    "llama-index": (
        "llama-index-postprocessor-cohere-rerank==0.10.0",
        "llama-index-postprocessor-jinaai-rerank==0.6.0",
        "llama-index-postprocessor-siliconflow-rerank==0.5.0",
        "llama-index-postprocessor-tei-rerank==0.6.0",
        "llama-index-postprocessor-xinference-rerank==0.5.0",
        "llama-index-postprocessor-nvidia-rerank==0.7.0",
    ),
    "langchain-community": ("langchain-community==0.4.2", "infinity-client==0.0.78"),
    "haystack": ("cohere-haystack==11.0.0", "jina-haystack==2.0.1", "huggingface-api-haystack==3.1.0"),
    "voyageai": ("voyageai==0.5.0", "langchain-voyageai==0.4.1"),
    "xinference": ("xinference-client==4.1.0",),
    "rerankers": ("rerankers==0.10.0", "requests"),
    "nvidia": ("langchain-nvidia-ai-endpoints==1.5.0",),
    "agno": ("agno==3.1.10", "cohere==7.3.1"),
}


def cache_folder() -> Path:
    """Return where the environments are kept: `$QWEN_RERANK_CLIENTS`, else a folder of the user's cache."""
    given = os.environ.get("QWEN_RERANK_CLIENTS")
    return Path(given) if given else Path.home() / ".cache" / "qwen-rerank" / "clients"


def python_of(name: str) -> Path:
    """Return the environment's interpreter; make the environment where it is absent or was made for other versions."""
    requirements = REQUIREMENTS[name]
    folder = cache_folder() / name
    stamp = folder / "made-for"
    wanted = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements], check=True)
        stamp.write_text(wanted)
    return python


def main() -> None:
    """Make the environments named on the command line, or all."""
    for name in sys.argv[1:] or REQUIREMENTS:
        print(name, python_of(name), flush=True)


if __name__ == "__main__":
    main()
