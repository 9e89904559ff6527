"""Wiring: a first stage before a reranker, rerankers in a row, first stages side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeVar

from tqdm import tqdm

from qwen_rerank.checks import check_count, check_query, check_texts, check_weights, kind_of
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.fusion import DEFAULT_K
from qwen_rerank.fusion import rank_fusion as rank_fusion
from qwen_rerank.protocols import AsyncFirstStage, FirstStage, SecondStage
from qwen_rerank.reranker import Rankable, Reranker
from qwen_rerank.sharing import SharedCopies
from qwen_rerank.types import Candidate, RankedDocument

Stage = TypeVar("Stage")


@dataclass(frozen=True, slots=True, eq=False)
class Cascade(SharedCopies):
    """Rerankers in a row, cheap ones first: each passes its `top_n` best on to the next.

    The result is the last one's: its scores, its order, its threshold. Thresholds of the others are ignored. `index`
    and `first_stage_score` are those of the original candidates.

    Args:
        stages: `Reranker`s, in the order they run.
    """

    stages: Sequence[Reranker]

    def __post_init__(self) -> None:
        *first, last = _checked_stages(self.stages, Reranker, "Reranker")
        object.__setattr__(self, "stages", (*(replace(stage, threshold=None) for stage in first), last))

    @property
    def name(self) -> str:
        """The last stage's name."""
        return self.stages[-1].name

    @property
    def top_n(self) -> int | None:
        """The last stage's longest result; None for all."""
        return self.stages[-1].top_n

    def rerank(
        self,
        query: str,
        candidates: Sequence[Rankable],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the candidates that reach the last stage, most relevant first.

        `top_n` is the last stage's; a result is never longer than what the stage before passes on. `instruction` is
        given to every stage. Otherwise as `Reranker.rerank`.
        """
        *first, last = self.stages
        passes: list[list[RankedDocument]] = []
        for stage in first:
            passes.append(stage.rerank(query, candidates, instruction=instruction))
            candidates = _as_candidates(passes[-1])
        return _trace(passes, last.rerank(query, candidates, top_n=top_n, instruction=instruction))

    async def arerank(
        self,
        query: str,
        candidates: Sequence[Rankable],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `rerank`, without blocking the event loop."""
        *first, last = self.stages
        passes: list[list[RankedDocument]] = []
        for stage in first:
            passes.append(await stage.arerank(query, candidates, instruction=instruction))
            candidates = _as_candidates(passes[-1])
        return _trace(passes, await last.arerank(query, candidates, top_n=top_n, instruction=instruction))

    def rerank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence[Rankable]],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[list[RankedDocument]]:
        """Return `rerank` of every query with its candidates; every stage scores all queries together."""
        *first, last = self.stages
        passes: list[list[list[RankedDocument]]] = []
        for stage in first:
            passes.append(stage.rerank_many(queries, candidates, instruction=instruction))
            candidates = [_as_candidates(hits) for hits in passes[-1]]
        results = last.rerank_many(queries, candidates, top_n=top_n, instruction=instruction)
        return [_trace([hits[n] for hits in passes], result) for n, result in enumerate(results)]


def _as_candidates(hits: Sequence[RankedDocument]) -> list[Candidate]:
    return [Candidate(hit.document, hit.first_stage_score, hit.rank) for hit in hits]


def _trace(passes: Sequence[Sequence[RankedDocument]], hits: list[RankedDocument]) -> list[RankedDocument]:
    """Return `hits` with `index` followed back through the earlier stages to the original candidates."""
    for earlier in reversed(passes):
        hits = [replace(hit, index=earlier[hit.index].index) for hit in hits]
    return hits


def _checked_stages(stages: Sequence[Stage], kind: type[Any], name: str) -> tuple[Stage, ...]:
    """Return stages, of which a generator would give none the second time."""
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, kind) for stage in stages):
        raise InvalidInputError(f"stages must be a list of at least one {name}, not {stages!r}.")
    return tuple(stages)


@dataclass(frozen=True, slots=True)
class TwoRounds:
    """The results of both stages for one query.

    Attributes:
        candidates: What the first stage found, best first.
        ranked: What the reranker made of it, most relevant first; `index` is a place in `candidates`.
    """

    candidates: list[Candidate]
    ranked: list[RankedDocument]


@dataclass(frozen=True, slots=True, eq=False)
class TwoStageRetriever(SharedCopies):
    """A query in, its best documents out: the first stage recalls `top_k`, the reranker keeps `top_n`.

    Args:
        first_stage: Anything with `search(query, top_k, *, filter=None)`; an `asearch` is used where it has one.
        reranker: A `Reranker`, a `Cascade`, or anything else with their methods.
        top_k: Candidates that are recalled.
        top_n: Documents that are returned.
    """

    first_stage: FirstStage
    reranker: SecondStage
    _: KW_ONLY
    top_k: int = 100
    top_n: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.first_stage, FirstStage):
            raise InvalidInputError(f"first_stage must have a method search, not be {kind_of(self.first_stage)}.")
        if not callable(getattr(self.reranker, "rerank", None)):
            raise InvalidInputError(f"reranker must be a Reranker or a Cascade, not {kind_of(self.reranker)}.")
        check_count("top_k", self.top_k)
        check_count("top_n", self.top_n)

    def retrieve(
        self,
        query: str,
        *,
        top_k: int | None = None,
        top_n: int | None = None,
        filter: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the best documents for `query`, most relevant first.

        Args:
            query: What is searched for.
            top_k: Candidates of this call; None for the retriever's own.
            top_n: Documents of this call; None for the retriever's own.
            filter: Given to the first stage: which documents may be recalled.
            instruction: What relevance means in this call; None for the reranker's own.
        """
        return self.retrieve_rounds(query, top_k=top_k, top_n=top_n, filter=filter, instruction=instruction).ranked

    async def aretrieve(
        self,
        query: str,
        *,
        top_k: int | None = None,
        top_n: int | None = None,
        filter: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `retrieve`, without blocking the event loop."""
        rounds = await self.aretrieve_rounds(query, top_k=top_k, top_n=top_n, filter=filter, instruction=instruction)
        return rounds.ranked

    def retrieve_rounds(
        self,
        query: str,
        *,
        top_k: int | None = None,
        top_n: int | None = None,
        filter: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> TwoRounds:
        """Return what `retrieve` does and the candidates it was chosen from, for those who show both."""
        top_k, top_n = self._limits(query, top_k, top_n)
        candidates = self.first_stage.search(query, top_k, filter=filter)[:top_k]
        return TwoRounds(candidates, self.reranker.rerank(query, candidates, top_n=top_n, instruction=instruction))

    async def aretrieve_rounds(
        self,
        query: str,
        *,
        top_k: int | None = None,
        top_n: int | None = None,
        filter: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> TwoRounds:
        """As `retrieve_rounds`, without blocking the event loop."""
        top_k, top_n = self._limits(query, top_k, top_n)
        if isinstance(self.first_stage, AsyncFirstStage):
            candidates = await self.first_stage.asearch(query, top_k, filter=filter)
        else:
            candidates = await asyncio.to_thread(self.first_stage.search, query, top_k, filter=filter)
        candidates = candidates[:top_k]
        ranked = await self.reranker.arerank(query, candidates, top_n=top_n, instruction=instruction)
        return TwoRounds(candidates, ranked)

    def retrieve_many(
        self,
        queries: Sequence[str],
        *,
        top_k: int | None = None,
        top_n: int | None = None,
        filter: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> list[list[RankedDocument]]:
        """Return `retrieve` of every query; their candidates are scored together."""
        texts = check_texts("queries", queries)
        limits = [self._limits(query, top_k, top_n) for query in texts]
        if not limits:
            return []
        top_k, top_n = limits[0]
        candidates = [
            self.first_stage.search(query, top_k, filter=filter)[:top_k]
            for query in tqdm(texts, desc="first stage", unit="query", disable=None, leave=False)
        ]
        return self.reranker.rerank_many(texts, candidates, top_n=top_n, instruction=instruction)

    def _limits(self, query: str, top_k: int | None, top_n: int | None) -> tuple[int, int]:
        """Check a call's arguments before the first stage works for nothing."""
        check_query(query)
        return (
            self.top_k if top_k is None else check_count("top_k", top_k),
            self.top_n if top_n is None else check_count("top_n", top_n),
        )


@dataclass(frozen=True, slots=True, eq=False)
class FusedFirstStage(SharedCopies):
    """Several first stages as one, for example dense and lexical recall, joined by `rank_fusion`.

    Args:
        stages: First stages; each recalls `top_k`.
        k: Damps the first ranks, at least 1.
        weights: How much each stage counts, one number a stage; None for all alike.
    """

    stages: Sequence[FirstStage]
    _: KW_ONLY
    k: int = DEFAULT_K
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        stages = _checked_stages(self.stages, FirstStage, "first stage")
        object.__setattr__(self, "stages", stages)
        check_count("k", self.k)
        if self.weights is not None:
            object.__setattr__(self, "weights", check_weights("weights", self.weights, count=len(stages)))

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Return at most `top_k` candidates, best first, ranks from 1."""
        check_count("top_k", top_k)
        found = [stage.search(query, top_k, filter=filter) for stage in self.stages]
        return rank_fusion(found, k=self.k, weights=self.weights)[:top_k]
