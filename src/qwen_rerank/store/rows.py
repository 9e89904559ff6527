"""Rows of the database, one a document, and the checks of ids, texts, metadata and vectors before they become one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qwen_rerank.bounded_json import JsonLimitError, loads
from qwen_rerank.checks import check_choice, check_text, kind_of
from qwen_rerank.errors import InvalidInputError, StoreError
from qwen_rerank.store.errors import DimensionMismatchError, InvalidEmbeddingError
from qwen_rerank.types import Document


@dataclass(frozen=True, slots=True)
class Row:
    """One document as UTF-8, with its digests.

    A row number is given once and never again, so a row never changes: replacing a document deletes a row and adds one.

    Attributes:
        number: Row number, from 1.
        id: The document's id.
        text: Its text.
        metadata: Its metadata as JSON.
        vector_digest: Digest of its vector, or None for a text without tokens, which has no vector.
    """

    number: int
    id: bytes
    text: bytes
    metadata: bytes
    vector_digest: bytes | None

    def digest(self) -> bytes:
        """Return 16 bytes that change with anything in the row, its vector included."""
        found = row_digest(self.number, self.id, self.text, self.metadata, self.vector_digest)
        if found is None:
            raise TypeError(f"row {self.number} holds no bytes")
        return found

    def document(self) -> Document:
        """Return the document.

        Raises:
            StoreError: If its metadata would take too much to read, as none that was added here would.
        """
        try:
            metadata = loads(self.metadata)
        except JsonLimitError as exc:
            raise StoreError(f"the metadata of document {self.id.decode()!r:.80} {exc}, so it is not read.") from exc
        return Document(self.id.decode(), self.text.decode(), metadata)


def row_digest(number: int, id: bytes, text: bytes, metadata: bytes, vector: bytes | None) -> bytes | None:
    """Return the digest of a row's fields; None where a damaged row holds values of other types."""
    try:
        head = b"%d %d %d %d " % (number, len(id), len(text), len(metadata))
        return hashlib.blake2b(b"".join((head, id, text, metadata, vector or b"")), digest_size=16).digest()
    except TypeError:
        return None


def vector_digest(vector: bytes) -> bytes:
    """Return 16 bytes that change with the vector."""
    return hashlib.blake2b(vector, digest_size=16).digest()


def check_documents(documents: object, *, errors: str = "strict") -> list[Document]:
    """Return `documents` as a list; a bare string becomes a document whose id is a hash of its text.

    With `errors="replace"` lone surrogates of texts become U+FFFD.

    Raises:
        InvalidInputError: If it is no iterable of documents or strings, or a field of one is not what it should be.
    """
    if isinstance(documents, str | bytes | Mapping | Document) or not isinstance(documents, Iterable):
        raise InvalidInputError(
            f"documents must be a list of Document or strings, not {type(documents).__name__}; wrap one as [document]."
        )
    if check_choice("errors", errors, ("strict", "replace")) == "replace":
        documents = map(_repaired, documents)
    return [_check_document(f"documents[{i}]", document) for i, document in enumerate(documents)]


def _repaired(document: object) -> object:
    if isinstance(document, Document) and isinstance(document.text, str):
        return replace(document, text=_repaired_text(document.text))
    return _repaired_text(document) if isinstance(document, str) else document


def _repaired_text(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_document(name: str, document: object) -> Document:
    if isinstance(document, str):
        return Document.from_text(check_text(name, document))
    if not isinstance(document, Document):
        raise InvalidInputError(f"{name} must be a Document or a string, not {kind_of(document)}.")
    check_id(f"{name}.id", document.id)
    check_text(f"{name}.text", document.text)
    return document


def check_id(name: str, value: object) -> str:
    """Return `value` if it is a string with something in it."""
    if not check_text(name, value):
        raise InvalidInputError(f"{name} is empty; give every document an id of its own.")
    return str(value)


def check_ids(ids: object) -> list[str]:
    """Return `ids` as a list of ids; a single string is refused."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InvalidInputError(f"ids must be a list of strings, not {type(ids).__name__}; wrap one id as [id].")
    return [check_id(f"ids[{i}]", one) for i, one in enumerate(ids)]


def encode_metadata(name: str, metadata: Mapping[str, Any]) -> bytes:
    """Return metadata as JSON.

    Raises:
        InvalidInputError: If it would not come back from JSON equal to what it is.
    """
    try:
        encoded = json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{name} must hold what JSON can carry: {exc}.") from exc
    data = check_text(name, encoded).encode()
    try:
        exact = loads(data) == metadata
    except (JsonLimitError, RecursionError) as exc:
        raise InvalidInputError(f"{name} {exc}; keep so much elsewhere, and here where it is.") from exc
    if not exact:
        raise InvalidInputError(
            f"{name} must come back from JSON as it is: keys must be strings, and lists must not be tuples."
        )
    return data


def encode_row(number: int, document: Document, vector: bytes | None, *, place: int) -> Row:
    """Return the row of `documents[place]`."""
    return Row(
        number=number,
        id=document.id.encode(),
        text=document.text.encode(),
        metadata=encode_metadata(f"documents[{place}].metadata", document.metadata),
        vector_digest=None if vector is None else vector_digest(vector),
    )


def check_vectors(vectors: object, *, dim: int, count: int | None = None) -> np.ndarray:
    """Return `vectors` as contiguous float32 `(n, dim)`.

    Raises:
        DimensionMismatchError: If the shape is another.
        InvalidInputError: If the values are no real numbers.
        InvalidEmbeddingError: If one is NaN, or infinite, or too large for float32.
    """
    array = np.asarray(vectors)
    if array.ndim != 2 or array.shape[1] != dim or (count is not None and len(array) != count):
        raise DimensionMismatchError((count, dim), array.shape)
    if array.dtype.kind not in "fiu":
        raise InvalidInputError(f"vectors must hold real numbers, not {array.dtype}; give a float32 array.")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise InvalidEmbeddingError(int(np.argmin(finite)), "holds NaN or infinity")
    return array


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Return rows of length 1, float32 `(n, dim)`; a row of zeros stays one."""
    # In float64, because the square of a large or tiny float32 is no float32.
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    np.divide(wide, norms, out=wide, where=norms > 0)
    return wide.astype(np.float32)


def check_not_zero(vectors: np.ndarray) -> np.ndarray:
    """Return `vectors` if no row is all zeros.

    Raises:
        InvalidEmbeddingError: If one is: it has no direction, so it is similar to nothing.
    """
    zero = ~vectors.any(axis=1)
    if zero.any():
        raise InvalidEmbeddingError(int(np.argmax(zero)), "is all zeros, which has no direction")
    return vectors


def repeated(ids: Sequence[str]) -> list[str]:
    """Return the ids that occur more than once, in order."""
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for one in ids:
        if one in seen:
            twice[one] = None
        seen.add(one)
    return list(twice)
