"""The parts that the vector stores of both frameworks share: their models as embedders, relevance from scores, diversity."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_rerank.checks import check_count, check_probability
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.fusion import HYBRID_K
from qwen_rerank.protocols import Embedder
from qwen_rerank.store import FaissStore
from qwen_rerank.store.creation import check_options
from qwen_rerank.types import Candidate

# What LlamaIndex's store keeps of a node beside its text: all else of it, its class, its own metadata "ref_doc_id".
NODE_KEYS = ("_node_content", "_node_type", "_node_ref_doc_id")
_PROBE = "How long is a vector?"
_NAMES = ("model_name", "model", "repo_id", "deployment")

Embed = Callable[[list[str]], Sequence[Sequence[float]]]


class FrameworkEmbedder:
    """A framework's embedding model as an `Embedder`.

    Args:
        model: The framework's object; its model's name tells one model from another, whatever framework it comes from.
        queries: Embeds queries.
        documents: Embeds documents.
        dim: Length of a vector; None embeds a short text to learn it.
    """

    def __init__(self, model: object, *, queries: Embed, documents: Embed, dim: int | None = None) -> None:
        self._queries = queries
        self._documents = documents
        named = (getattr(model, name, None) for name in _NAMES)
        self.name = next((name for name in named if isinstance(name, str) and name), type(model).__name__)
        self.dim = self.embed_queries([_PROBE]).shape[1] if dim is None else check_count("dim", dim)
        self.fingerprint = f"model {self.name}"

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`."""
        return matrix(self._queries(list(texts)))

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`."""
        return matrix(self._documents(list(texts)))


def matrix(vectors: Sequence[Sequence[float]]) -> np.ndarray:
    """Return vectors as float32 `(n_vectors, dim)`.

    Raises:
        InvalidInputError: If they are not equally long rows of numbers.
    """
    try:
        found = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        raise InvalidInputError(
            "the embedding model's vectors must be equally long rows of numbers, one a text."
        ) from exc
    if found.ndim != 2:
        raise InvalidInputError(
            f"the embedding model returned an array of shape {found.shape}; expected one row a text."
        )
    return found


def without_node(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored document's metadata without what LlamaIndex's store keeps of a node there."""
    hidden = NODE_KEYS if NODE_KEYS[0] in metadata else ()
    return {key: value for key, value in metadata.items() if key not in hidden}


def check_no_more(call: str, arguments: Mapping[str, object], *, known: Sequence[str]) -> None:
    """Refuse keyword arguments that would be ignored, such as a misspelt one; `known` names those that there are."""
    if arguments:
        raise InvalidInputError(
            f"{call} got {', '.join(map(repr, arguments))}, which it does not take; it takes {', '.join(known)}."
        )


def open_folder(
    path: str | os.PathLike[str], embedder: Embedder | None, *, read_only: bool, device: str = "auto", **options: Any
) -> FaissStore:
    """Return the store of a folder, open to read, or to write and made if there is none; `options` as for `create`."""
    if not read_only:
        return FaissStore.open_or_create(path, embedder, device=device, **options)
    check_options(path, options)
    return FaissStore.open(path, embedder, read_only=True, device=device)


def relevance(candidate: Candidate, *, weights: Sequence[float] | None = None) -> float:
    """Return a candidate's score as a relevance in [0, 1] that keeps the order: 1 is the best that there can be.

    Args:
        candidate: What a store found.
        weights: Of the two halves of a hybrid search; None for both alike.
    """
    score = candidate.score or 0.0
    if candidate.score_kind == "fused":
        return min(1.0, score * (HYBRID_K + 1) / sum(weights or (1, 1)))  # first in both halves
    if candidate.score_kind == "bm25":
        return score / (1 + score)  # BM25 has no upper end
    if candidate.score_kind == "ip":
        return 0.5 + score / (2 + 2 * abs(score))  # nor have inner products, nor a lower one
    return float(np.clip((1 + score) / 2, 0, 1))


def diverse(query: np.ndarray, vectors: np.ndarray, *, k: int, lambda_mult: float) -> list[int]:
    """Return up to `k` places of `vectors` by maximal marginal relevance (Carbonell and Goldstein 1998).

    Args:
        query: Vector of the query, `(dim,)`.
        vectors: Candidates `(n, dim)`, most similar first.
        k: How many to choose.
        lambda_mult: 1 looks at the similarity to the query alone, 0 at the difference from those already chosen alone.
    """
    check_probability("lambda_mult", lambda_mult)
    unit, asked = _unit(vectors), _unit(query[None])[0]
    similar = unit @ asked
    nearest = np.full(len(unit), -np.inf)  # similarity to the nearest one that was chosen
    chosen: list[int] = []
    while len(chosen) < min(k, len(unit)):
        penalty = np.where(np.isfinite(nearest), nearest, 0.0)
        gain = lambda_mult * similar - (1 - lambda_mult) * penalty
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)) if chosen else int(np.argmax(similar)))
        nearest = np.maximum(nearest, unit @ unit[chosen[-1]])
    return chosen


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0))
