"""One model folder: its small files read with care, pickle and code refused, its weights named and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qwen_rerank.bounded_json import JsonLimitError, check_json, loads
from qwen_rerank.errors import ModelCorruptError, ModelError, ModelIncompleteError, TokenizerError, UnsafeModelError
from qwen_rerank.models.names import GGUF_ADVICE
from qwen_rerank.regular_files import open_regular, read_regular

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROMPT_FILE = "qwen_rerank.json"  # of a fine-tuned Qwen3-Reranker, whose prompt is its own
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HASHED = (".json", ".safetensors", ".txt", ".model")
_MAX_JSON_BYTES = 64 * 1024**2
_MAX_TEXT_BYTES = 256 * 1024**2
_MAX_TOKENIZER_VALUES = 4_000_000  # Gemma has 1.8 million, most of them in its merges
_MAX_HEADER_BYTES = 100_000_000
_OFFSET_FAMILIES = ("roberta", "camembert", "mpnet")  # their positions begin after the padding id
_SAMPLE_BYTES = 4096


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the object, or with `kind=list` the list, in a JSON file.

    Raises:
        ModelCorruptError: If it cannot be read, is no regular file, is absurdly large, or holds something else.
    """
    try:
        data = loads(read_regular(path, most_bytes=_MAX_JSON_BYTES))
    except (OSError, ValueError) as exc:
        raise ModelCorruptError(f"{path} cannot be read as JSON ({exc}); download the model again.") from exc
    if not isinstance(data, kind):
        raise ModelCorruptError(
            f"{path} must hold a JSON {'list' if kind is list else 'object'}, not {type(data).__name__}."
        )
    return data


def read_text(path: Path, *, error: type[ModelError] = ModelCorruptError) -> str:
    """Return a text file's content.

    Raises:
        ModelIncompleteError: If it is missing.
        ModelError: The class that `error` names, if it cannot be read, is no regular file, absurdly large, or not UTF-8.
    """
    if not path.exists():
        raise ModelIncompleteError(f"{path} is missing; download the model again.")
    try:
        return read_regular(path, most_bytes=_MAX_TEXT_BYTES).decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise error(f"{path} cannot be read ({exc}); download the model again.") from exc


def read_tokenizer(path: Path, *, is_ours: bool = False) -> str:
    """Return the text of a `tokenizer.json`; what makes it unreadable is a `TokenizerError`.

    Args:
        path: The file.
        is_ours: Whether it ships with this package, and needs no bounds.
    """
    text = read_text(path, error=TokenizerError)
    if is_ours:
        return text
    try:
        check_json(text.encode(), max_values=_MAX_TOKENIZER_VALUES)
    except JsonLimitError as exc:
        raise TokenizerError(f"{path} {exc}, which no tokenizer does; download the model again.") from exc
    return text


def read_settings(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a whole model that needs no code of its own.

    Raises:
        ModelIncompleteError: If there is none, or the folder holds an adapter.
        ModelCorruptError: If it cannot be read.
        UnsafeModelError: If it names code.
        ModelError: If the folder holds a GGUF file in its place.
    """
    path = folder / "config.json"
    refuse_formats(folder)
    if not path.exists():
        raise ModelIncompleteError(
            f"{folder} has no config.json; give the folder of a whole model, or download it again."
        )
    settings: dict[str, Any] = read_json(path)
    refuse_code(settings, path)
    return settings


def refuse_formats(folder: Path) -> None:
    """Refuse a folder that holds an adapter, or a GGUF file instead of a model.

    Raises:
        ModelIncompleteError: If it is an adapter's.
        ModelError: If it is a GGUF file's.
    """
    # Transformers would load the base model that an adapter names, from wherever that is.
    if (folder / "adapter_config.json").exists():
        raise ModelIncompleteError(
            f"{folder} holds an adapter (LoRA) and no whole model; merge it into its base model first, and save the "
            "result where no adapter_config.json is."
        )
    if not (folder / "config.json").exists():
        _refuse_gguf(folder)


def refuse_code(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse a configuration that names code, from its folder or from the hub.

    Raises:
        UnsafeModelError: If it does.
    """
    if settings.get("auto_map"):
        raise UnsafeModelError(
            f"{path} asks for code of its own (auto_map), which is never run; use a model that needs none."
        )
    # The name of an attention implementation on the hub would download code and run it.
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(settings.get(name)):
            raise UnsafeModelError(f"{path} names {name} {settings[name]!r}, which is code from elsewhere.")


def longest_input(folder: Path, settings: Mapping[str, Any], tokenizer_limit: float | None = None) -> int | None:
    """Return how many tokens an encoder takes: the shortest of the limits that its files set, None where none does.

    Args:
        folder: Of the model.
        settings: Its `config.json`.
        tokenizer_limit: Of the loaded tokenizer; None to read it in `tokenizer_config.json`.
    """
    limits = [tokenizer_limit]
    for name, entry in (("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")):
        if (folder / name).is_file() and (tokenizer_limit is None or name != "tokenizer_config.json"):
            limits.append(read_json(folder / name).get(entry))
    positions = settings.get("max_position_embeddings")
    if isinstance(positions, int):
        is_offset = any(family in str(settings.get("model_type")) for family in _OFFSET_FAMILIES)
        limits.append(positions - int(settings.get("pad_token_id") or 0) - 1 if is_offset else positions)
    # A tokenizer without a limit says 10**30.
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 1 <= limit < 1_000_000]
    return min(known, default=None)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: the single one, or the shards that its index names.

    Raises:
        UnsafeModelError: If the weights exist only as pickle.
        ModelError: If they exist only as GGUF.
        ModelIncompleteError: If there are none, or a shard is missing.
        ModelCorruptError: If the index cannot be used.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        paths = [folder / shard for shard in sorted(set(read_index(folder).values()))]
        for path in paths:
            if not path.is_file():
                raise ModelIncompleteError(f"{path} is missing, but {INDEX} names it; download the model again.")
        return paths
    if found := pickles(folder):
        raise UnsafeModelError(
            f"{folder} has weights only as {found[0]}, and loading that file could run code; convert it to safetensors."
        )
    _refuse_gguf(folder)
    raise ModelIncompleteError(f"{folder} has no {SINGLE} and no {INDEX}; download the model again.")


def pickles(folder: Path) -> list[str]:
    """Return the names of the pickled weights in a folder, which are never opened."""
    return sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds safetensors weights, or the index of some."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def read_index(folder: Path) -> dict[str, str]:
    """Return the shard of every weight as the folder's index tells, `{}` where the weights are in a single file.

    Raises:
        ModelCorruptError: If the index has no map, or names a file outside its folder.
    """
    path = folder / INDEX
    if (folder / SINGLE).is_file():
        return {}
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelCorruptError(f"{path} has no weight_map; download the model again.")
    for name, shard in places.items():
        # A bare file name: an index must not reach outside its folder.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelCorruptError(f"{path}: {name!r} lies in {shard!r}, which is not the name of a safetensors file.")
    return places


def weight_names(folder: Path) -> set[str]:
    """Return the names of all weights in a folder and the folders below it."""
    names: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        try:
            with open_regular(path) as file:
                names.update(_read_header(path, file)[1])
        except OSError as exc:
            raise ModelCorruptError(f"{path} cannot be read ({exc}); download the model again.") from exc
    return names


def folder_digest(folder: Path) -> str:
    """Return 16 hex digits over configuration, tokenizer and weights; the same for a copy elsewhere.

    Of every weight its name, dtype, shape, first and last 4 KiB count: training touches every tensor and so is seen.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in _HASHED or name.startswith(("onnx/", "openvino/", ".")) or not path.is_file():
            continue
        digest.update(name.encode() + b"\0")
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                _sample_weights(path, file, digest)
            else:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _refuse_gguf(folder: Path) -> None:
    if found := sorted(folder.glob("*.gguf")):
        raise ModelError(f"{folder} holds a GGUF file ({found[0].name}), which cannot be read here; {GGUF_ADVICE}.")


def _read_header(path: Path, file: BinaryIO) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return where the data starts, in bytes, and the span of each weight in it."""
    size, whole = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if not 2 <= size <= min(_MAX_HEADER_BYTES, whole - 8):
        raise ModelCorruptError(f"{path} is no safetensors file; download it again.")
    try:
        entries = loads(file.read(size))
        spans = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
        sound = all(0 <= start <= end <= whole - 8 - size for start, end in spans.values())
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelCorruptError(f"{path} has a header that cannot be read; download it again.") from exc
    if not sound:
        raise ModelCorruptError(f"{path} is cut short: a weight lies beyond its end; download it again.")
    return 8 + size, spans


def _sample_weights(path: Path, file: BinaryIO, digest: Any) -> None:
    begin, spans = _read_header(path, file)
    file.seek(0)
    digest.update(file.read(begin))
    for start, end in sorted(spans.values()):
        for place in (start, max(start, end - _SAMPLE_BYTES)):
            file.seek(begin + place)
            digest.update(file.read(min(_SAMPLE_BYTES, end - place)))
