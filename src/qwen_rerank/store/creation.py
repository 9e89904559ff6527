"""The options that a store is made with, checked for a new one and held against the settings of one that is there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_rerank.checks import check_choice
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import Embedder, NamedEmbedder
from qwen_rerank.store.commits import StoreSettings
from qwen_rerank.store.filter_sql import check_fields
from qwen_rerank.store.index import parse_factory
from qwen_rerank.store.opening import holds_nothing, resolve, settings_of

_METRICS = ("cosine", "ip")
_NUMBERS = ("float32", "float16")
_OPTIONS = ("index", "metric", "words", "vectors", "indexed_fields")


def new_settings(
    embedder: Embedder | None, *, metric: str, index: str, words: bool, vectors: str, indexed_fields: Iterable[str]
) -> StoreSettings:
    """Return the settings of a new store, with an identity of its own.

    Raises:
        InvalidInputError: If one of them is wrong.
    """
    return StoreSettings(
        store=uuid.uuid4().hex,
        embedder=str(embedder.name) if isinstance(embedder, NamedEmbedder) else "",
        fingerprint="" if embedder is None else embedder.fingerprint,
        dim=0 if embedder is None else embedder.dim,
        metric=check_choice("metric", metric, _METRICS),
        index="Flat" if embedder is None else parse_factory(index, embedder.dim),
        words=words or embedder is None,
        vectors=check_choice("vectors", vectors, _NUMBERS),
        indexed_fields=check_fields(indexed_fields),
    )


def check_options(path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Refuse options of `FaissStore.create` that there are not, or that a store which is there was not made with.

    `index="auto"` goes with every store, and so do `indexed_fields`: a filter finds the same without them.

    Raises:
        InvalidInputError: If an option is refused; says why.
        StoreError: If something is there that cannot be read as a store.
    """
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise InvalidInputError(f"a store has no option {unknown[0]!r}; the options are {', '.join(_OPTIONS)}.")
    folder = resolve(path)
    if not options or holds_nothing(folder):
        return
    made = settings_of(folder)
    asked = {name: options[name] for name in ("metric", "vectors", "words", "index") if name in options}
    if "metric" in asked:
        check_choice("metric", asked["metric"], _METRICS)
    if "vectors" in asked:
        check_choice("vectors", asked["vectors"], _NUMBERS)
    if asked.get("index") == "auto" or not made.dim:
        asked.pop("index", None)
    if not made.dim:
        asked.pop("words", None)  # which such a store has in any case
    if "index" in asked:
        asked["index"] = parse_factory(asked["index"], made.dim)
    check_fields(options.get("indexed_fields", ()))
    for name, value in asked.items():
        if value != getattr(made, name):
            raise InvalidInputError(
                f"{name}={options[name]!r}, but the store at {folder} was made with {getattr(made, name)!r}; leave the "
                "option out, or make another store at another path."
            )
