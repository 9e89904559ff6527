"""Model names to folders: those that ship with the package, the user's own, and the hub's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from qwen_rerank.checks import check_query
from qwen_rerank.errors import InvalidInputError, ModelError, ModelNotFoundError

Kind = Literal["reranker", "embedder"]

_OWN = Path(str(files("qwen_rerank")))
SHIPPED = ("pocket", *(["mini"] if (_OWN / "mini").is_dir() else []))
# A hub name stands for whatever was pushed last. The official ones are pinned: a later push once changed their chat
# template so that every pair scored the same.
PINNED = {
    "Qwen/Qwen3-Reranker-0.6B": "6e9e69830b95c52b5fd889b7690dda3329508de3",
    "Qwen/Qwen3-Reranker-4B": "f16fc5d5d2b9b1d0db8280929242745d79794ef5",
    "Qwen/Qwen3-Reranker-8B": "5fa94080caafeaa45a15d11f969d7978e087a3db",
}
EXAMPLES: dict[Kind, str] = {"reranker": "Qwen/Qwen3-Reranker-0.6B", "embedder": "Qwen/Qwen3-Embedding-0.6B"}
GGUF_ADVICE = "serve it with llama.cpp's llama-server and give that server's URL, or give a folder with safetensors"
# Neither pickles nor code are ever downloaded.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_LEFT_OUT = ("openvino/*", "checkpoint-*/*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The folder of a model.

    Attributes:
        name: As the user named it.
        path: The folder.
        revision: Commit on the hub; None for a folder of the user's own or of this package.
    """

    name: str
    path: Path
    revision: str | None = None


def find_model(
    name: str, *, kind: Kind = "reranker", revision: str | None = None, files: Sequence[str] = MODEL_FILES
) -> ModelFolder:
    """Return the folder of a shipped name, a local folder, or a hub name (downloaded on first use).

    Args:
        name: `"pocket"`, a folder (`~` is the home folder), or `owner/name` on the hub.
        kind: Which of the shipped models of that name is meant.
        revision: Commit, tag or branch; only for hub names. The official names are pinned where it is None.
        files: Patterns of the files to download.

    Raises:
        InvalidInputError: If the name is empty, or a revision is given for what is not on the hub.
        ModelNotFoundError: If there is none, or the hub cannot be reached and the model is not in its cache.
        ModelError: If it is a GGUF file.
    """
    path = _shipped(name, kind) if check_query(name, name="model") in SHIPPED else _local(name)
    if path.is_dir():
        if revision is not None:
            raise InvalidInputError(f"revision ({revision!r}) is for hub names only, and {name} is a local folder.")
        return ModelFolder(name, path)
    if path.suffix == ".gguf":
        raise ModelError(f"{name} is a GGUF file, which cannot be read here; {GGUF_ADVICE}.")
    if path.exists():
        raise ModelNotFoundError(
            f"{name} is a file, not a folder and no hub name; give the folder that holds config.json."
        )
    if not _HUB_NAME.fullmatch(name):
        raise ModelNotFoundError(
            f"{name!r} is no folder and no hub name; give a folder with config.json, tokenizer.json and "
            f"model.safetensors, a hub name such as {EXAMPLES[kind]}, or 'pocket'."
        )
    return _download(name, revision or PINNED.get(name), files)


def find_tokenizer(name: str) -> Path:
    """Return the `tokenizer.json` of a model, or the file itself where its path is given.

    Raises:
        ModelError: As `find_model`.
    """
    path = _local(name)
    return path if path.is_file() else find_model(name, files=("tokenizer.json",)).path / "tokenizer.json"


def _shipped(name: str, kind: Kind) -> Path:
    path = _OWN / name / kind
    if not path.is_dir() and any((_OWN / name).glob("*.onnx")):
        path = _OWN / name  # both graphs share a tokenizer and a vocabulary
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} is missing: this installation lacks the {name} model; install it again.")
    return path


def _local(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as exc:  # ~somebody who has no home
        raise ModelNotFoundError(f"{name!r} is no folder and no hub name ({exc}).") from exc


def _download(name: str, revision: str | None, wanted: Sequence[str]) -> ModelFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Next to graphs lie copies of the small files; they come only with a graph that is wanted.
    left_out = [*_LEFT_OUT] if any(pattern.startswith("onnx/") for pattern in wanted) else ["onnx/*", *_LEFT_OUT]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=left_out))
    except LocalEntryNotFoundError as exc:
        raise ModelNotFoundError(
            f"{name} is not in the local cache and the model hub cannot be reached ({first_line(exc)}); download the "
            "model on a connected machine and pass its folder, or set HF_ENDPOINT to a mirror."
        ) from exc
    except Exception as exc:  # the hub's client has no common base for its errors
        raise ModelNotFoundError(
            f"{name} (revision {revision or 'main'}) cannot be had from the model hub ({first_line(exc)}); check the "
            "name and revision, or pass a local folder."
        ) from exc
    return ModelFolder(name, path, path.name if _COMMIT.fullmatch(path.name) else revision)


def first_line(exc: BaseException) -> str:
    """Return class and first line of a foreign error, for a sentence of ours."""
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0] if text else 'no details'}"
