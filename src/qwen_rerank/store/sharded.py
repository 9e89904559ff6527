"""ShardedFirstStage: several stores, each with a part of the documents, searched as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from qwen_rerank.checks import check_choice, check_count, check_query, check_texts, check_weights
from qwen_rerank.errors import InvalidInputError, StoreError
from qwen_rerank.fusion import HYBRID_K, rank_fusion
from qwen_rerank.sharing import SharedCopies, made_from, renew_in_child
from qwen_rerank.store.errors import EmbedderMismatchError
from qwen_rerank.store.faiss_store import FaissStore
from qwen_rerank.store.rows import check_vectors
from qwen_rerank.store.searching import recall_depth
from qwen_rerank.types import Candidate
from qwen_rerank.words import WordStatistics

_log = logging.getLogger(__name__)

_MOST_THREADS = 32

T = TypeVar("T")
Filter = Mapping[str, Any] | None


class ShardedFirstStage(SharedCopies):
    """Several `FaissStore`s as one first stage: each call searches all of them side by side and merges exactly.

    The result is that of one store with all documents, added shard after shard: dense scores are compared as they are;
    words are weighed by how common they are in all shards together; a hybrid search fuses the best by meaning and the
    best by words of all shards, not of each. With exact indexes (Flat) it is the same to the last bit for up to
    20 queries at once, beyond which FAISS multiplies them by kernels that round otherwise; which of several equal ones are
    the last of a short dense result is its choice, too. An approximate index finds in each shard what it finds there.

    Each half of a search, by meaning and by words, gets one commit of each shard as a whole; what is written meanwhile
    may be in the second half alone. An id belongs into one shard; one that stands in two is found once, where it scores better, and counts twice in how common its words are.
    `repeated_ids` looks for such.

    The stores stay the caller's: closing them is not this object's business.

    Args:
        stores: Open stores, at least one, all built with the same embedder and metric.
        on_failure: A shard that cannot be searched is an error: "raise". Or it is "leave-out": the others answer, a
            warning is logged, and `failures` says which shard is missing and why.

    Raises:
        InvalidInputError: If there is no store, one is there twice, or their scores could not be compared.
        EmbedderMismatchError: If they were built with different embedders.
    """

    def __init__(self, stores: Sequence[FaissStore], *, on_failure: Literal["raise", "leave-out"] = "raise") -> None:
        self.stores = _checked(stores)
        self.on_failure = check_choice("on_failure", on_failure, ("raise", "leave-out"))
        self._failures: dict[Path, StoreError] = {}
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Begin with threads of this process's own."""
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, len(self.stores)), thread_name_prefix="qwen-rerank-shard")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the stores, each in its own way."""
        return made_from, (ShardedFirstStage, {"stores": self.stores, "on_failure": self.on_failure})

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    @property
    def failures(self) -> Mapping[Path, StoreError]:
        """Folder of each shard that the latest search of it had to leave out, and why; empty where all answer."""
        return dict(self._failures)

    def repeated_ids(self) -> list[str]:
        """Return the ids that stand in more than one shard; it reads the ids of all documents."""
        seen: set[str] = set()
        again: dict[str, None] = {}
        for store in self.stores:
            ids = store.ids()
            again.update(dict.fromkeys(one for one in ids if one in seen))
            seen.update(ids)
        return list(again)

    def search(
        self,
        query: str,
        top_k: int = 100,
        *,
        mode: str | None = None,
        filter: Filter = None,
        weights: Sequence[float] | None = None,
    ) -> list[Candidate]:
        """Return the `top_k` documents of all shards that fit the query best; as `FaissStore.search`.

        Equal scores stand in the order of the shards, and within one in order of arrival.

        Raises:
            StoreError: If a shard cannot be searched, or none of them.
        """
        check_query(query)
        return self.search_many([query], top_k, mode=mode, filter=filter, weights=weights)[0]

    async def asearch(
        self,
        query: str,
        top_k: int = 100,
        *,
        mode: str | None = None,
        filter: Filter = None,
        weights: Sequence[float] | None = None,
    ) -> list[Candidate]:
        """As `search`, without blocking the event loop."""
        return await asyncio.to_thread(self.search, query, top_k, mode=mode, filter=filter, weights=weights)

    def search_many(
        self,
        queries: Sequence[str],
        top_k: int = 100,
        *,
        mode: str | None = None,
        filter: Filter = None,
        weights: Sequence[float] | None = None,
        vectors: np.ndarray | None = None,
    ) -> list[list[Candidate]]:
        """Return what `search` returns for each query; the queries are embedded once for all shards.

        Args:
            queries: What to look for.
            top_k: As for `search`.
            mode: As for `search`.
            filter: As for `search`.
            weights: As for `search`.
            vectors: Vectors of the queries `(n_queries, dim)`; None embeds them.
        """
        texts = [check_query(text, name=f"queries[{i}]") for i, text in enumerate(check_texts("queries", queries))]
        check_count("top_k", top_k)
        checked = None if weights is None else check_weights("weights", weights, count=2)
        # 1. What each shard can do, and how common the words are in all of them.
        known = self._ask(self.stores, lambda store: store._prepared(texts, mode, embeds=vectors is None))
        chosen = _common({store: one for store, (one, _) in known.items()})
        statistics = sum((one for _, one in known.values()), start=WordStatistics(0, 0, {}))
        if not texts:
            return []
        asked: dict[str, np.ndarray | None] = {"lexical": None}
        if chosen != "lexical":
            first = next(iter(known))
            found = first._embedder().embed_queries(texts) if vectors is None else vectors
            asked["dense"] = check_vectors(found, dim=first.dim, count=len(texts))
        # 2. Each half of the search, in every shard.
        halves = ("dense", "lexical") if chosen == "hybrid" else (chosen,)
        depth = recall_depth(chosen, top_k)

        def search(store: FaissStore) -> list[list[list[Candidate]]]:
            return [store._search(texts, asked[half], depth, half, filter, statistics=statistics) for half in halves]

        answers = self._ask(known, search).values()
        # 3. One ranking of each half for every query, and one of both.
        merged = [[_merged(shards, depth) for shards in zip(*half)] for half in zip(*answers)]
        if chosen != "hybrid":
            return merged[0]
        return [rank_fusion(pair, k=HYBRID_K, weights=checked)[:top_k] for pair in zip(*merged)]

    def _ask(self, stores: Iterable[FaissStore], question: Callable[[FaissStore], T]) -> dict[FaissStore, T]:
        """Return what each shard answers, in order; a failing one is an error or left out, as `on_failure` says."""
        futures = {store: self._threads.submit(question, store) for store in stores}
        answers: dict[FaissStore, T] = {}
        for store, future in futures.items():
            try:
                answers[store] = future.result()
                self._failures.pop(store.path, None)
            except InvalidInputError:  # the caller's, and the same in every shard
                raise
            except StoreError as exc:
                exc.add_note(f"shard {store.path}")
                if self.on_failure == "raise":
                    raise
                _log.warning("The shard %s is left out of a search: %s", store.path, exc)
                self._failures[store.path] = exc
                failed = exc
        if not answers:
            raise failed
        return answers


def _checked(stores: Sequence[FaissStore]) -> list[FaissStore]:
    if not isinstance(stores, Sequence) or not stores or not all(isinstance(store, FaissStore) for store in stores):
        raise InvalidInputError(f"stores must be a list of at least one open FaissStore, not {stores!r}.")
    paths = [store.path for store in stores]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise InvalidInputError(f"stores holds {', '.join(twice)} twice; give every shard once.")
    first = stores[0]._settings
    for store in stores[1:]:
        other = store._settings
        if other.fingerprint != first.fingerprint:
            raise EmbedderMismatchError(first.fingerprint, other.fingerprint)
        if (other.metric, other.dim) != (first.metric, first.dim):
            raise InvalidInputError(
                f"{store.path} has metric {other.metric!r} and {other.dim} dimensions, {stores[0].path} has "
                f"{first.metric!r} and {first.dim}; build all shards alike."
            )
    return list(stores)


def _common(modes: Mapping[FaissStore, str]) -> str:
    """Return the mode of all shards."""
    (first, mode), *others = modes.items()
    for store, other in others:
        if other != mode:
            raise InvalidInputError(
                f"{first.path} would be searched with mode={mode!r} and {store.path} with {other!r}; name the mode, or call "
                "build_words() where words are lacking."
            )
    return mode


def _merged(shards: Sequence[Sequence[Candidate]], depth: int) -> list[Candidate]:
    """Return the best candidates of all shards by their scores, each id once; equal ones stand in order of the shards."""
    # Sorting is stable, and reads the rankings of the shards as runs.
    ranked = sorted((hit for shard in shards for hit in shard), key=lambda hit: -(hit.score or 0.0))
    unique: dict[str, Candidate] = {}
    for hit in ranked:
        unique.setdefault(hit.document.id, hit)
        if len(unique) == depth:
            break
    return [Candidate(hit.document, hit.score, rank, hit.score_kind) for rank, hit in enumerate(unique.values(), 1)]
