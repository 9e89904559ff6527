"""Commands of `qwen-rerank` for checks of a model or server, and prompt templates."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
