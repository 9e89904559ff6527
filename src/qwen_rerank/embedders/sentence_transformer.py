"""Any sentence-transformers model as an embedder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

from qwen_rerank.checks import check_choice, check_count, check_text, check_texts
from qwen_rerank.errors import MissingExtraError, ModelCorruptError, ModelError, ModelIncompleteError, UnsafeModelError
from qwen_rerank.models.folder import (
    folder_digest,
    pickles,
    read_json,
    read_settings,
    refuse_formats,
    weight_files,
    weight_names,
)
from qwen_rerank.models.names import find_model, first_line
from qwen_rerank.sharing import ComputeThread, SharedCopies, check_gpu_after_fork, made_from

try:
    import torch
    from sentence_transformers import SentenceTransformer
except ImportError as exc:
    raise MissingExtraError(
        "SentenceTransformerEmbedder",
        package="sentence-transformers",
        extra="dense",
        cause=exc,
        instead="the small model that ships with the package, 'mini' (--embedder mini)",
    ) from (None if exc.name in ("torch", "sentence_transformers") else exc)

_DTYPES = ("float32", "bfloat16", "float16")
_BATCHES_AT_ONCE = 32  # texts are sorted by length inside this many batches, so little is padded


class SentenceTransformerEmbedder(SharedCopies):
    """Embeds queries and documents, each with the prompt that the model was trained with.

    Prompts are those of the model's `config_sentence_transformers.json`: for Qwen3-Embedding an instruction before
    queries and nothing before documents. Only safetensors weights are read and no code of the model's own is run. May
    be shared by threads, which then wait for one another.

    Args:
        model: Model name on the hub, or folder.
        device: "auto", or a torch device such as "cpu" or "cuda:1".
        dtype: In which the model computes; vectors are float32.
        batch_size: Texts of one forward pass.
        query_prompt: Stands before every query; None is the model's own.
        document_prompt: Stands before every document; None is the model's own.
        revision: Commit or tag on the hub.

    Raises:
        ModelError: If the model is missing, damaged, unsafe or no embedding model.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 32,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        revision: str | None = None,
    ) -> None:
        check_choice("dtype", dtype, _DTYPES)
        self.name = model
        self._settings = {
            "model": model,
            "device": device,
            "dtype": dtype,
            "batch_size": batch_size,
            "query_prompt": query_prompt,
            "document_prompt": document_prompt,
            "revision": revision,
        }
        self._batch_size = check_count("batch_size", batch_size)
        self._thread = ComputeThread("qwen-rerank-embed")
        folder = find_model(model, kind="embedder", revision=revision).path
        _check_modules(folder)
        digest = folder_digest(folder)
        if device != "cpu":
            check_gpu_after_fork()
        self._model = self._thread.run(_load, str(folder), device=device, dtype=dtype)
        self._thread.on_cpu = self._model.device.type == "cpu"
        _check_complete(self._model, folder)
        for name, prompt in (("query", query_prompt), ("document", document_prompt)):
            if prompt is not None:
                self._model.prompts[name] = check_text(f"{name}_prompt", prompt)
        dim = self._model.get_embedding_dimension()
        if dim is None:
            raise ModelError(f"{model} does not say how long its vectors are; it is no embedding model.")
        self.dim = int(dim)
        self.fingerprint = self._fingerprint(digest, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; the model is loaded again where they arrive."""
        return made_from, (type(self), self._settings)

    def _fingerprint(self, digest: str, dtype: str) -> str:
        prompts = [self._model.prompts, self._model.default_prompt_name, self._model.max_seq_length]
        settings = json.dumps([digest, *prompts, self.dim, dtype], sort_keys=True)
        return f"sentence-transformers/{dtype}/{hashlib.sha256(settings.encode()).hexdigest()[:16]}"

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, L2-normalised, with the query prompt."""
        return self._embed(check_texts("texts", texts), self._model.encode_query)

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, L2-normalised, with the document prompt."""
        return self._embed(check_texts("texts", texts), self._model.encode_document)

    def _embed(self, texts: list[str], encode: Callable[..., Any]) -> np.ndarray:
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        places = self._thread.run(lambda: [place for place, text in enumerate(texts) if self._has_tokens(text)])
        step = self._batch_size * _BATCHES_AT_ONCE
        hidden = True if len(places) <= step else None  # None: silent when not on a terminal
        for start in tqdm(range(0, len(places), step), desc="embed", unit_scale=step, disable=hidden):
            chunk = places[start : start + step]
            out[chunk] = self._thread.run(
                encode,
                [texts[place] for place in chunk],
                batch_size=self._batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        # Here and not in the model, whose dtype may be too coarse for it.
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        np.divide(out, norms, out=out, where=norms > 0)
        return out

    def _has_tokens(self, text: str) -> bool:
        if any(character.isalnum() for character in text):
            return True
        # The model would embed its prompt and special tokens alone, which says nothing about the text.
        return bool(text.strip()) and bool(self._model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_modules(folder: Path) -> None:
    """Check that loading the folder runs no code of its own and unpickles nothing."""
    path = folder / "modules.json"
    refuse_formats(folder)
    if not path.is_file():
        raise ModelIncompleteError(f"{folder} has no modules.json, so it is no sentence-transformers model.")
    modules = read_json(path, list)
    if not all(isinstance(module, dict) for module in modules):
        raise ModelCorruptError(f"{path} must hold a JSON list of modules.")
    for module in modules:
        kind, name = str(module.get("type")), str(module.get("path", ""))
        if not kind.startswith("sentence_transformers."):
            raise UnsafeModelError(f"{path} names the class {kind}: code of its own is never run.")
        place = (folder / name).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise UnsafeModelError(f"{path} names the path {name!r}, which is outside the model.")
        settings = read_settings(place) if (place / "config.json").is_file() else {}
        if "model_type" in settings or pickles(place):
            weight_files(place)


def _load(folder: str, *, device: str, dtype: str) -> SentenceTransformer:
    try:
        return SentenceTransformer(
            folder,
            device=None if device == "auto" else device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": getattr(torch, dtype), "use_safetensors": True},
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as exc:
        if "trust_remote_code" in str(exc):
            raise UnsafeModelError(f"{folder} needs code of its own, which is never run ({first_line(exc)}).") from exc
        raise ModelCorruptError(f"{folder} cannot be loaded as an embedding model ({first_line(exc)}).") from exc


def _check_complete(model: SentenceTransformer, folder: Path) -> None:
    # transformers fills weights that are not in the file with random numbers and only logs it.
    stored = {name.replace(".gamma", ".weight").replace(".beta", ".bias") for name in weight_names(folder)}
    # A checkpoint may name its weights below the model's own name, as in "roberta.encoder.…".
    stored |= {name.partition(".")[2] for name in stored}
    for name, _ in model.named_parameters():
        # sentence-transformers puts the number of its module before a name, and for the transformer an attribute.
        parts = name.split(".")
        if {".".join(parts[1:]), ".".join(parts[2:])}.isdisjoint(stored) and "pooler" not in parts:
            raise ModelIncompleteError(f"{folder} has no weight for {name}, which would be random; download it again.")
