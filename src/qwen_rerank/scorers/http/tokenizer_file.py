"""Finds a checkpoint's `tokenizer.json`: in a folder, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from qwen_rerank.errors import ModelNotFoundError

_POCKET = Path(__file__).parents[2] / "pocket" / "reranker"


def read_tokenizer_json(source: str) -> tuple[str, str]:
    """Return the file's text and its name for messages.

    Args:
        source: A folder, a `tokenizer.json`, a hub name, or "pocket".

    Raises:
        ModelNotFoundError: If there is none.
    """
    path = _POCKET if source == "pocket" else Path(source).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    elif not path.is_file():
        path = _download(source)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelNotFoundError(
            f"tokenizer {source!r}: {path} cannot be read ({exc}); give a folder or hub name."
        ) from exc


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as exc:  # the hub client raises its own, requests' and OS errors
        raise ModelNotFoundError(
            f"tokenizer {name!r} is neither a folder with a tokenizer.json nor a model that the hub client can fetch "
            f"({type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else 'no reason given'})."
        ) from exc
