"""Prompt templates for servers, as package data.

Both end in one expression: Jinja drops a file's last newline and SGLang drops all of them, so newlines that belong to
the prompt may not stand at the end of the file.
"""

from __future__ import annotations

from importlib.resources import files

from qwen_rerank.checks import check_choice

SERVERS = ("vllm", "sglang")


def template_text(server: str) -> str:
    """Return the template file for `--chat-template` of "vllm" or "sglang"."""
    name = check_choice("server", server, SERVERS)
    return files(__name__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
