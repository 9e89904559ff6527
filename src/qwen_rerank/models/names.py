"""Model names to folders: those that ship with the package, the user's own, and the hub's."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Literal

from qwen_rerank.checks import check_query
from qwen_rerank.errors import HubUnreachableError, InvalidInputError, ModelCorruptError, ModelError, ModelNotFoundError

Kind = Literal["reranker", "embedder"]

_OWN = Path(str(files("qwen_rerank")))
SHIPPED = ("pocket", *(["mini"] if (_OWN / "mini").is_dir() else []))


def ships(path: Path) -> bool:
    """Return whether a folder is one of this package, whose files need no bounds."""
    return path.resolve().is_relative_to(_OWN.resolve())


# A hub name stands for whatever was pushed last. The official ones are pinned: a later push once changed their chat
# template so that every pair scored the same.
PINNED = {
    "Qwen/Qwen3-Reranker-0.6B": "6e9e69830b95c52b5fd889b7690dda3329508de3",
    "Qwen/Qwen3-Reranker-4B": "f16fc5d5d2b9b1d0db8280929242745d79794ef5",
    "Qwen/Qwen3-Reranker-8B": "5fa94080caafeaa45a15d11f969d7978e087a3db",
}
_OPTIONS: dict[Kind, str] = {"reranker": "--model", "embedder": "--embedder"}
EXAMPLES: dict[Kind, str] = {"reranker": "Qwen/Qwen3-Reranker-0.6B", "embedder": "Qwen/Qwen3-Embedding-0.6B"}
GGUF_ADVICE = "serve it with llama.cpp's llama-server and give that server's URL, or give a folder with safetensors"
# Neither pickles nor code are ever downloaded.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_LEFT_OUT = ("openvino/*", "checkpoint-*/*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATIENCE_S = 5.0
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
        ModelCorruptError: If there is a pipe, a device or a socket in the folder.
        ModelError: If it is a GGUF file.
    """
    path = (
        _shipped(name, kind)
        if check_query(name, name="model", give="a hub name, a folder, 'mini' or 'pocket'") in SHIPPED
        else _local(name)
    )
    if path.is_dir():
        if revision is not None:
            raise InvalidInputError(f"revision ({revision!r}) is for hub names only, and {name} is a local folder.")
        _refuse_irregular(path)
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
            f"model.safetensors, a hub name such as {EXAMPLES[kind]}, 'mini' or 'pocket'."
        )
    return _download(name, kind, revision or PINNED.get(name), files)


def _refuse_irregular(folder: Path) -> None:
    """Refuse a folder with a pipe, a device or a socket in it: the libraries that load models would wait for it."""
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelCorruptError(f"{path} is no regular file; take it out of the model's folder.")


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


def _download(name: str, kind: Kind, revision: str | None, wanted: Sequence[str]) -> ModelFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Next to graphs lie copies of the small files; they come only with a graph that is wanted.
    left_out = [*_LEFT_OUT] if any(pattern.startswith("onnx/") for pattern in wanted) else ["onnx/*", *_LEFT_OUT]
    # Asked first: the hub's client tries each file five times, with a warning for each, before it gives up.
    reason = why_no_hub(timeout_s=_HUB_PATIENCE_S)
    try:
        path = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=left_out,
                local_files_only=reason is not None,
            )
        )
    except LocalEntryNotFoundError as exc:
        raise HubUnreachableError(
            f"{name} is not in the local cache and the model hub cannot be reached ({reason or first_line(exc)}); check "
            f"how the name is spelt{_similar(name)}, set HF_ENDPOINT to the address of a mirror, or download the model "
            f"elsewhere (from ModelScope: `modelscope download --model {name}`) and give its folder, or use the small "
            f"one that is here: 'mini' ({_OPTIONS[kind]} mini)."
        ) from exc
    except Exception as exc:  # the hub's client has no common base for its errors
        raise ModelNotFoundError(
            f"{name} (revision {revision or 'main'}) cannot be had from the model hub ({first_line(exc)}); check the "
            "name and revision, or pass a local folder."
        ) from exc
    return ModelFolder(name, path, path.name if _COMMIT.fullmatch(path.name) else revision)


def _similar(name: str) -> str:
    """Return words that name the published model which a name nearly is, or none."""
    near = [] if name in PINNED else get_close_matches(name, PINNED, n=1, cutoff=0.95)
    return f" ({near[0]}?)" if near else ""


# What a hub of one's own may say of its root; other errors are those of a gateway in between.
_PRIVATE_HUB = (401, 404, 405)


def why_no_hub(*, timeout_s: float) -> str | None:
    """Return why the model hub cannot be reached, with its address; None where it answers."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=timeout_s).status_code
            answered = f"{constants.ENDPOINT}: answered with {status}{_through_proxy()}"
            found.append(None if status < 400 or status in _PRIVATE_HUB else answered)
        except Exception as exc:  # of whichever HTTP library the client has
            lacks_socks = isinstance(exc, ImportError) and "SOCKS" in str(exc)
            why = _without_socks() if lacks_socks else f"{first_line(exc)}{_through_proxy()}"
            found.append(f"{constants.ENDPOINT}: {why}")

    # In a thread, as looking an address up knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else f"{constants.ENDPOINT}: no answer within {timeout_s:g} s"


_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def _through_proxy() -> str:
    """Return words that name the variable of a proxy which the hub is asked through, or none."""
    return next((f", through the proxy that {name} names" for name in _PROXY_VARIABLES if os.environ.get(name)), "")


def _without_socks() -> str:
    # The client makes ready for every proxy, also for one that it does not go through.
    variables = (*_PROXY_VARIABLES, "HTTP_PROXY", "http_proxy")
    variable = next((name for name in variables if os.environ.get(name, "").startswith("socks")), "a setting")
    return f"{variable} names a SOCKS proxy, which needs socksio: pip install socksio"


def first_line(exc: BaseException) -> str:
    """Return class and first line of a foreign error, for a sentence of ours."""
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0] if text else 'no details'}"
