"""`Dialect`: the requests and answers of one family of rerank servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.scorers.http.answers import HttpAnswer, ParsedAnswer, ScoreKind, read_results
from qwen_rerank.scorers.http.dialects.token_routes import TokenRoute


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """What one request asks; `logits` asks for scores before the sigmoid."""

    query: str
    documents: Sequence[str]
    model: str | None = None
    instruction: str | None = None
    logits: bool = False


class Dialect:
    """How one family of servers is asked for scores of texts, and how it answers.

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

    def body(self, ask: TextRequest) -> dict[str, Any]:
        """Return the JSON to send."""
        model = {} if ask.model is None else {"model": ask.model}
        return {"query": ask.query, "documents": list(ask.documents), **model, **self._fields(ask)}

    def read(self, answer: HttpAnswer, payload: Any, n: int) -> ParsedAnswer:
        """Return the scores, in the order the documents were sent."""
        return read_results(answer, payload, n)

    def _fields(self, ask: TextRequest) -> dict[str, Any]:
        """What this dialect sends beyond query, documents and model."""
        return {}


def optional(name: str, value: str | None) -> dict[str, Any]:
    """Return one field, or none for None."""
    return {} if value is None else {name: value}
