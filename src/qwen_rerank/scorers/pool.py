"""`ScorerPool`: several scorers of the same model behind one, for example one a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.protocols import Scorer, SimpleScorer
from qwen_rerank.scorers.adapted import as_scorer
from qwen_rerank.scorers.base import BaseScorer, Call, Prepared, ScoreRequest, joined, mapped
from qwen_rerank.sharing import ForkLock
from qwen_rerank.types import Fit, Scores


class ScorerPool(BaseScorer):
    """Hands every call to the scorer with least to do; the queries of one call are shared out.

    The scorers stay the caller's: closing them is not the pool's business.

    Args:
        scorers: At least one; all with the same fingerprint, so that it does not matter which one answers.

    Raises:
        InvalidInputError: If there is no scorer, or their scores would differ.
    """

    def __init__(self, scorers: Sequence[Scorer | SimpleScorer | str]) -> None:
        if not scorers:
            raise InvalidInputError("scorers is empty; give at least one scorer.")
        self._scorers = [as_scorer(scorer) for scorer in scorers]
        fingerprints = sorted({scorer.fingerprint for scorer in self._scorers})
        if len(fingerprints) > 1:
            raise InvalidInputError(
                f"scorers must all give the same scores, but their fingerprints are {', '.join(fingerprints)}; use one "
                "model, template, instruction, max_length and dtype for all of them."
            )
        self.name = self._scorers[0].name
        self.fingerprint = fingerprints[0]
        self.takes_instruction = self._scorers[0].takes_instruction
        self._busy = [0] * len(scorers)  # documents under way
        self._turns = itertools.count()
        self._lock = ForkLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the scorers, each in its own way."""
        return ScorerPool, (self._scorers,)

    @property
    def calibrated(self) -> bool:
        """The scorers' own word."""
        return self._scorers[0].calibrated

    @property
    def max_length(self) -> int | None:
        """The scorers' own."""
        return self._scorers[0].max_length

    @property
    def token_budget(self) -> int | None:
        """Tokens of one forward pass of every scorer, or None where one of them cannot tell."""
        budgets = [scorer.token_budget for scorer in self._scorers]
        known = [budget for budget in budgets if budget is not None]
        return sum(known) if len(known) == len(budgets) else None

    @property
    def encoder(self) -> PromptEncoder | None:
        """The encoder that builds the prompts; the same for every scorer."""
        return self._scorers[0].encoder

    def _begin(self, call: Call) -> Future[list[Scores]]:
        """Share the queries out, largest first to the least busy scorer."""
        shares: dict[int, list[int]] = {}
        for i in sorted(range(len(call.requests)), key=lambda i: len(call.requests[i].texts), reverse=True):
            shares.setdefault(self._take(len(call.requests[i].texts)), []).append(i)

        def begin(place: int) -> Future[list[Scores]]:
            part = Call([call.requests[i] for i in shares[place]])
            call.on_cancel(part.cancel)
            n_documents = sum(len(request.texts) for request in part.requests)
            try:
                future = self._scorers[place]._begin(part)
            except BaseException:
                self._give_back(place, n_documents)
                raise
            future.add_done_callback(lambda _: self._give_back(place, n_documents))
            return future

        if len(shares) == 1:
            futures = [begin(place) for place in shares]
        else:  # a scorer that blocks must not keep the others waiting
            with ThreadPoolExecutor(len(shares)) as threads:
                futures = list(threads.map(begin, shares))
        order = [i for indices in shares.values() for i in indices]
        return mapped(joined(futures), lambda parts: _in_order(order, [scores for part in parts for scores in part]))

    def prepare(self, request: ScoreRequest) -> Prepared:
        """Return a request that one of the scorers has made ready, and that this one scores."""
        place = self._take(0)
        return _Placed(self, place, self._scorers[place].prepare(request))

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        return self._scorers[0].measure(query, texts, instruction)

    def _check_open(self) -> None:
        for scorer in self._scorers:
            scorer._check_open()

    def _take(self, n_documents: int, place: int | None = None) -> int:
        """Return a scorer's place, busier now by so many documents: the least busy one where none is named."""
        with self._lock:
            if place is None:
                n, turn = len(self._busy), next(self._turns)  # equally busy ones take turns
                place = min(range(n), key=lambda i: (self._busy[i], (i - turn) % n))
            self._busy[place] += n_documents
            return place

    def _give_back(self, place: int, n_documents: int) -> None:
        with self._lock:
            self._busy[place] -= n_documents


class _Placed(Prepared):
    """A request at one scorer of a pool, which counts as busy while a slice is scored."""

    def __init__(self, pool: ScorerPool, place: int, inner: Prepared) -> None:
        self.tokens = inner.tokens
        self.shared_tokens = inner.shared_tokens
        self._pool = pool
        self._place = place
        self._inner = inner

    async def ascore(self, start: int, stop: int) -> Scores:
        """Return what came of a slice."""
        self._pool._take(stop - start, self._place)
        try:
            return await self._inner.ascore(start, stop)
        finally:
            self._pool._give_back(self._place, stop - start)


def _in_order(order: Sequence[int], found: Sequence[Scores]) -> list[Scores]:
    """Return what was found for `order` in the order of the requests."""
    by_place = dict(zip(order, found, strict=True))
    return [by_place[place] for place in range(len(by_place))]
