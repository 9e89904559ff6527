"""Safetensors files of a checkpoint: which they are, and their tensors, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qwen_rerank.errors import ModelCorruptError, ModelIncompleteError, UnsafeModelError
from qwen_rerank.scorers.qwen.config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Return every stored tensor by name, on the CPU, in its stored dtype, memory-mapped.

    Raises:
        ModelIncompleteError: If there are no weights, a shard is missing, or the index and the shards disagree.
        ModelCorruptError: If a file cannot be read.
        UnsafeModelError: If the weights exist only as pickle.
    """
    if (folder / SINGLE).is_file():
        return _read(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_indexed(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UnsafeModelError(
            f"{folder} has weights only as {pickles[0]}, and loading that file could run code; convert it to safetensors."
        )
    adapter = "; it holds a LoRA adapter, merge it into its base model first" if _is_adapter(folder) else ""
    raise ModelIncompleteError(f"{folder} has neither {SINGLE} nor {INDEX}{adapter}.")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _read_indexed(folder: Path) -> dict[str, torch.Tensor]:
    places = _weight_map(folder / INDEX)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(places.values())):
        path = folder / shard
        if not path.is_file():
            raise ModelIncompleteError(f"{path} is missing, but {INDEX} names it; download the checkpoint again.")
        found = _read(path)
        strays = sorted(name for name in found if places.get(name) != shard)
        absent = sorted(name for name, place in places.items() if place == shard and name not in found)
        if strays or absent:
            raise ModelIncompleteError(
                f"{path} and {INDEX} disagree: {(strays or absent)[0]} is {'only in the shard' if strays else 'not in it'}."
            )
        tensors |= found
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelCorruptError(f"{path} has no weight_map; download the checkpoint again.")
    for name, shard in places.items():
        # A bare file name: an index must not reach outside its folder.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelCorruptError(f"{path}: {name!r} lies in {shard!r}, which is not the name of a safetensors file.")
    return places


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as exc:
        raise ModelCorruptError(f"{path} cannot be read as safetensors ({exc}); download it again.") from exc
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelCorruptError(
                f"{path}: {name} is stored as {tensor.dtype}; float32, float16 or bfloat16 is needed."
            )
    return tensors
