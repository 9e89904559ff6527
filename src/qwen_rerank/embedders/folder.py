"""The folder of a sentence-transformers model: found, checked before anything is loaded, and fingerprinted."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

from qwen_rerank.errors import ModelCorruptError, ModelIncompleteError, ModelNotFoundError, UnsafeModelError

# Neither pickles nor code are ever downloaded.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_SKIPPED = ["onnx/*", "openvino/*"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000


def find_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a local model or of a hub name, downloaded on first use.

    Raises:
        ModelNotFoundError: If there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_NAME.fullmatch(name):
        raise ModelNotFoundError(
            f"{name!r} is no folder and no hub name; give the folder of a sentence-transformers model, a hub name such "
            "as Qwen/Qwen3-Embedding-0.6B, or 'pocket'."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_SKIPPED))
    except (OSError, HFValidationError) as exc:
        raise ModelNotFoundError(
            f"{name} (revision {revision or 'main'}) is not in the local cache and cannot be had from the model hub "
            f"({type(exc).__name__}); check the name, or download it on a connected machine and give its folder."
        ) from exc


def check_folder(folder: Path) -> None:
    """Check that loading the folder runs no code of its own and unpickles nothing.

    Raises:
        ModelIncompleteError: If it is no sentence-transformers model or has no weights.
        ModelCorruptError: If a file cannot be read.
        UnsafeModelError: If it brings classes of its own, or weights only as pickles.
    """
    if not (folder / "modules.json").is_file():
        raise ModelIncompleteError(f"{folder} has no modules.json, so it is no sentence-transformers model.")
    modules = _read_json(folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelCorruptError(f"{folder / 'modules.json'} is not a list of modules.")
    for module in modules:
        kind = str(module.get("type"))
        if not kind.startswith("sentence_transformers."):
            raise UnsafeModelError(f"{folder / 'modules.json'} names the class {kind}: code of its own is never run.")
        _check_module(folder, str(module.get("path", "")))


def _check_module(folder: Path, name: str) -> None:
    place = (folder / name).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise UnsafeModelError(f"{folder / 'modules.json'} names the path {name!r}, which is outside the model.")
    config = _read_json(place / "config.json") if (place / "config.json").is_file() else {}
    if isinstance(config, dict) and "auto_map" in config:
        raise UnsafeModelError(f"{place / 'config.json'} has an auto_map: code of its own is never run.")
    has_weights = any(place.glob("*.safetensors"))
    if not has_weights and any(file for pattern in _PICKLES for file in place.glob(pattern)):
        raise UnsafeModelError(f"{place} has its weights only as pickles; convert them to model.safetensors.")
    if not has_weights and isinstance(config, dict) and "model_type" in config:
        raise ModelIncompleteError(f"{place} has no model.safetensors.")


def folder_digest(folder: Path) -> str:
    """Return 16 hex digits over configuration, tokenizer and weights; the same for a copy elsewhere.

    Of every weight its name, dtype, shape, first and last 4 KiB count: training touches every tensor and so is seen.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in (".json", ".safetensors", ".txt", ".model") or name.startswith(
            ("onnx/", "openvino/", ".")
        ):
            continue
        digest.update(name.encode() + b"\0")
        if path.suffix == ".safetensors":
            _sample_weights(path, digest)
        else:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def weight_names(folder: Path) -> set[str]:
    """Return the names of all weights that the folder holds."""
    names: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            names.update(_read_header(path, file)[1])
    return names


def _read_header(path: Path, file: BinaryIO) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return where the data starts, in bytes, and the span of each weight in it."""
    size, whole = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if not 2 <= size <= min(_MAX_HEADER_BYTES, whole - 8):
        raise ModelCorruptError(f"{path} is no safetensors file; download it again.")
    try:
        entries = json.loads(file.read(size))
        spans = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
        sound = all(0 <= start <= end <= whole - 8 - size for start, end in spans.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ModelCorruptError(f"{path} has a header that cannot be read; download it again.") from exc
    if not sound:
        raise ModelCorruptError(f"{path} is cut short: a weight lies beyond its end; download it again.")
    return 8 + size, spans


def _sample_weights(path: Path, digest: Any) -> None:
    with path.open("rb") as file:
        begin, spans = _read_header(path, file)
        file.seek(0)
        digest.update(file.read(begin))
        for start, end in sorted(spans.values()):
            for place in (start, max(start, end - _SAMPLE_BYTES)):
                file.seek(begin + place)
                digest.update(file.read(min(_SAMPLE_BYTES, end - place)))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelCorruptError(f"{path} cannot be read as JSON ({exc}).") from exc
