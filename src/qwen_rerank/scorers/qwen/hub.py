"""Which folder a model name means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qwen_rerank.errors import InvalidInputError, ModelNotFoundError

# A hub name stands for whatever was pushed last. The official ones are pinned: a later push once changed their chat
# template so that every pair scored the same.
PINNED = {
    "Qwen/Qwen3-Reranker-0.6B": "6e9e69830b95c52b5fd889b7690dda3329508de3",
    "Qwen/Qwen3-Reranker-4B": "f16fc5d5d2b9b1d0db8280929242745d79794ef5",
    "Qwen/Qwen3-Reranker-8B": "5fa94080caafeaa45a15d11f969d7978e087a3db",
}
_FILES = [
    "config.json",
    "tokenizer.json",
    "qwen_rerank.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*_LogitScore/config.json",
]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint lies.

    Attributes:
        name: As the user named it.
        path: The folder.
        revision: Commit on the hub; None for a folder of the user's own.
    """

    name: str
    path: Path
    revision: str | None


def resolve(model: str, revision: str | None = None) -> Source:
    """Return the folder of `"pocket"`, a local folder, or a hub name (downloaded on first use).

    Raises:
        InvalidInputError: If a revision is given for a local folder.
        ModelNotFoundError: If there is none, or the hub cannot be reached and the model is not in its cache.
    """
    if model == "pocket":
        return _pocket()
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InvalidInputError(f"revision ({revision!r}) is for hub names only, and {model} is a local folder.")
        return Source(model, path, None)
    if path.exists():
        raise ModelNotFoundError(f"{model} is a file, not a folder; name the folder that holds config.json.")
    if not _HUB_NAME.fullmatch(model):
        raise ModelNotFoundError(
            f"{model} does not exist; name a folder with config.json, tokenizer.json and model.safetensors, a hub name "
            "such as Qwen/Qwen3-Reranker-0.6B, or 'pocket'."
        )
    return _download(model, revision or PINNED.get(model))


def _pocket() -> Source:
    path = Path(str(files("qwen_rerank"))) / "pocket" / "reranker"
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} is missing: this installation lacks the pocket model; install it again.")
    return Source("pocket", path, None)


def _download(name: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except LocalEntryNotFoundError as exc:
        raise ModelNotFoundError(
            f"{name} is not in the local cache and the model hub cannot be reached ({_first_line(exc)}); download the "
            f"model on a connected machine and pass its folder, or set HF_ENDPOINT to a mirror."
        ) from exc
    except Exception as exc:  # the hub's client has no common base for its errors
        raise ModelNotFoundError(
            f"{name} (revision {revision or 'main'}) cannot be had from the model hub ({_first_line(exc)}); check the "
            "name and revision, or pass a local folder."
        ) from exc
    return Source(name, path, path.name if _COMMIT.fullmatch(path.name) else revision)


def _first_line(exc: Exception) -> str:
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0] if text else 'no details'}"
