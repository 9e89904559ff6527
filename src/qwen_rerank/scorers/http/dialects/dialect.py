"""`Dialect` and `TokenRoute`: the requests and answers of one family of rerank servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.scorers.http.answers import (
    HttpAnswer,
    ParsedAnswer,
    ScoreKind,
    model_name,
    prompt_tokens,
    read_results,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRequest:
    """One request for scores: of texts beside a query, or of whole prompts.

    Attributes:
        query: What is searched for; "" for prompts.
        documents: The texts.
        instruction: What relevance means; None for the server's own.
        prompts: Whole prompts as token ids, in place of texts.
        yes_id: Token id of the label that counts for relevance.
        no_id: Token id of the label that counts against it.
        model: Name to ask for, or None.
        logits: Whether scores before the sigmoid are wanted.
    """

    query: str = ""
    documents: Sequence[str] = ()
    instruction: str | None = None
    prompts: Sequence[list[int]] = ()
    yes_id: int = 0
    no_id: int = 0
    model: str | None = None
    logits: bool = False

    def __len__(self) -> int:
        return len(self.prompts) or len(self.documents)


class TokenRoute:
    """A route that takes whole prompts as token ids and tells how likely the two labels are.

    Attributes:
        path: Of the route.
        reserve: Tokens of the server's length that a prompt must leave free.
        kind: What its scores are.
        may_ignore_logits: Whether the request says if logits are wanted, which some releases ignore without a word.
    """

    path: ClassVar[str]
    reserve: ClassVar[int] = 1
    kind: ClassVar[ScoreKind] = "logit"
    may_ignore_logits: ClassVar[bool] = False

    def body(self, request: ServerRequest) -> dict[str, Any]:
        """Return the JSON to send."""
        return {**optional("model", request.model), **self._fields(request)}

    def read(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> ParsedAnswer:
        """Return the scores, in the order the prompts were sent."""
        return ParsedAnswer(self._scores(answer, payload, request), prompt_tokens(payload), model_name(payload))

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        """The fields that this route sends beyond the model."""
        raise NotImplementedError

    def _scores(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> np.ndarray:
        """Return the scores, float64 `(n_prompts,)`."""
        raise NotImplementedError


class Dialect:
    """A family of servers: the requests that it takes for scores of texts, and its answers.

    Attributes:
        name: As in `dialect=`.
        path: Of its rerank route.
        max_batch: Documents it takes in one request, by its default settings.
        needs_model: Whether a model must be named.
        carries_instruction: Whether its rerank route can carry one.
        scores_blank: Whether it scores an empty document; if not, it would refuse the whole request.
        kind: What its scores are, when logits are not asked for.
        can_give_logits: Whether its rerank route can be asked for logits.
        may_ignore_logits: Whether some releases ignore that without a word.
        token_routes: Routes that take whole prompts as token ids, the best first.
    """

    name: ClassVar[str]
    path: ClassVar[str] = "/v1/rerank"
    max_batch: ClassVar[int] = 256
    needs_model: ClassVar[bool] = False
    carries_instruction: ClassVar[bool] = False
    scores_blank: ClassVar[bool] = True
    kind: ClassVar[ScoreKind] = "probability"
    can_give_logits: ClassVar[bool] = False
    may_ignore_logits: ClassVar[bool] = False
    token_routes: ClassVar[tuple[TokenRoute, ...]] = ()

    def check(self, *, model: str | None, instruction: str | None) -> None:
        """Refuse what this dialect cannot carry."""
        if self.needs_model and model is None:
            raise InvalidInputError(f"dialect {self.name!r} needs model=, the name of the model to ask for.")
        if instruction is not None and not self.carries_instruction:
            raise InvalidInputError(
                f"a {self.name} server cannot be given an instruction, and would ignore it; leave instruction out, or use "
                "a server that carries one (vllm, sglang, xinference, qwen-rerank)."
            )

    def body(self, request: ServerRequest) -> dict[str, Any]:
        """Return the JSON to send."""
        texts = {"query": request.query, "documents": list(request.documents)}
        return {**texts, **optional("model", request.model), **self._fields(request)}

    def read(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> ParsedAnswer:
        """Return the scores, in the order the documents were sent."""
        return read_results(answer, payload, len(request))

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        """The fields that this dialect sends beyond query, documents and model."""
        return {}


def optional(name: str, value: str | None) -> dict[str, Any]:
    """Return one field, or none for None."""
    return {} if value is None else {name: value}
