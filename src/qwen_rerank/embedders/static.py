"""Static embeddings in numpy: one vector a token, a text is their mean. No torch, no sentence-transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from qwen_rerank.checks import check_texts
from qwen_rerank.errors import ModelCorruptError, ModelIncompleteError, ModelNotFoundError
from qwen_rerank.models.folder import SINGLE, read_tokenizer
from qwen_rerank.regular_files import read_regular
from qwen_rerank.sharing import SharedCopies, made_from

WEIGHTS = SINGLE
TOKENIZER = "tokenizer.json"
_KEY = "embedding.weight"  # as sentence-transformers' StaticEmbedding saves it
_TOKENS_AT_ONCE = 200_000  # rows gathered in one step; bounds memory for long texts


class StaticEmbedder(SharedCopies):
    """Embeds texts with a folder that sentence-transformers' `StaticEmbedding` saved. Thread-safe.

    Args:
        folder: Holds `model.safetensors` and `tokenizer.json`.
        name: What `load_embedder` takes to get it again, or "".

    Attributes:
        name: As given.
        dim: Length of a vector.
        fingerprint: Changes with the weights and the tokenizer.

    Raises:
        ModelNotFoundError: If the folder does not exist.
        ModelIncompleteError: If one of the two files, or the vectors in it, is missing.
        ModelCorruptError: If a file cannot be read, or the two do not belong together.
    """

    def __init__(self, folder: str | Path, *, name: str = "") -> None:
        self.name = name
        self._folder = path = Path(folder)
        if not path.is_dir():
            raise ModelNotFoundError(f"{str(path)!r} is no folder; give one that holds {WEIGHTS} and {TOKENIZER}.")
        self._vectors = _read_vectors(path / WEIGHTS)
        self._tokenizer = _read_tokenizer(path / TOKENIZER)
        size = self._tokenizer.get_vocab_size()
        if size > len(self._vectors):
            raise ModelCorruptError(
                f"{path / WEIGHTS} has {len(self._vectors)} vectors for the tokenizer's {size} tokens; "
                "the two files are not of one model."
            )
        self.dim = int(self._vectors.shape[1])
        self.fingerprint = "static-" + _digest(path / WEIGHTS, path / TOKENIZER)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle folder and name; the model is read again where they arrive."""
        return made_from, (type(self), {"folder": str(self._folder), "name": self.name})

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, L2-normalised; the model has no query prompt."""
        return self.embed_documents(texts)

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, L2-normalised; a text without known tokens gives a zero row.

        Raises:
            InvalidInputError: If `texts` is no list of strings.
        """
        encodings = self._tokenizer.encode_batch_fast(check_texts("texts", texts), add_special_tokens=False)
        out = np.zeros((len(encodings), self.dim), dtype=np.float32)
        for row, encoding in enumerate(encodings):
            ids = np.asarray(encoding.ids, dtype=np.int64)
            for start in range(0, len(ids), _TOKENS_AT_ONCE):
                out[row] += self._vectors[ids[start : start + _TOKENS_AT_ONCE]].sum(axis=0, dtype=np.float32)
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return np.asarray(np.divide(out, norms, out=np.zeros_like(out), where=norms > 0))


def _read_vectors(path: Path) -> np.ndarray:
    """Return the vectors, float32 `(n_tokens, dim)`."""
    if not path.is_file():
        raise ModelIncompleteError(f"{path} is missing; a static embedder is made of {WEIGHTS} and {TOKENIZER}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as exc:
        raise ModelCorruptError(f"{path} is not a readable safetensors file ({exc}).") from exc
    vectors = tensors.get(_KEY)
    if vectors is None:
        raise ModelIncompleteError(f"{path} holds {sorted(tensors)} and no {_KEY!r}; is it a static embedder?")
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ModelCorruptError(
            f"{path}: {_KEY} must be a finite matrix, not of shape {vectors.shape} with NaN or infinity."
        )
    return vectors.astype(np.float32)


def _read_tokenizer(path: Path) -> Tokenizer:
    text = read_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as exc:  # the library raises bare Exception
        raise ModelCorruptError(f"{path} is not a readable tokenizer ({exc}).") from exc
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(read_regular(path)).digest())
    return digest.hexdigest()[:16]
