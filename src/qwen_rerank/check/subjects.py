"""What is checked: a server as an application sees it, or a local model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qwen_rerank.errors import DocumentScoringError

if TYPE_CHECKING:
    from qwen_rerank.scorers.http import HttpScorer
    from qwen_rerank.scorers.http.session import Session
    from qwen_rerank.scorers.qwen import QwenScorer


@dataclass(frozen=True, slots=True)
class Scores:
    """What one request gave: float64 `(n,)` as reported, and the tokens counted, or None."""

    reported: np.ndarray
    prompt_tokens: int | None


class Subject(Protocol):
    """Something that scores.

    Attributes:
        title: For people.
        dialect: Of a server; "local" for a model in this process.
        carries_instruction: Whether it can be given one.
        length: Tokens of its longest prompt, or None.
        models: Names it goes by.
    """

    title: str
    dialect: str
    carries_instruction: bool
    length: int | None
    models: tuple[str, ...]

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Scores:
        """Return scores as an application would get them."""
        ...


@dataclass(slots=True)
class ServerSubject:
    """A server asked as applications ask it: by its rerank route, without special wishes."""

    scorer: HttpScorer
    session: Session = field(init=False)
    title: str = field(init=False)
    dialect: str = field(init=False)
    carries_instruction: bool = field(init=False)
    length: int | None = field(init=False)
    models: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.session = self.scorer.open()
        self.dialect = self.session.dialect.name
        self.title = f"{self.dialect} server at {self.scorer.config.url[0]}"
        self.carries_instruction = self.session.dialect.carries_instruction
        self.length = self.session.length
        named = (self.scorer.config.model,) if self.scorer.config.model else ()
        self.models = (*named, *self.session.models)

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Scores:
        """Return scores as the server sends them by default."""
        from qwen_rerank.scorers.http import ServerScores

        found = self.scorer.score_details(query, documents, instruction=instruction)
        if found.errors or not isinstance(found, ServerScores):
            raise DocumentScoringError(found.errors, found.log_odds)
        return Scores(found.reported, found.prompt_tokens)


@dataclass(slots=True)
class LocalSubject:
    """A model in this process; its scores are log-odds."""

    scorer: QwenScorer
    title: str = field(init=False)
    dialect: str = field(init=False, default="local")
    carries_instruction: bool = field(init=False, default=True)
    length: int | None = field(init=False)
    models: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.title = f"local model {self.scorer.name}"
        self.length = self.scorer.config.max_length
        self.models = (self.scorer.name,)

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Scores:
        """Return log-odds."""
        return Scores(self.scorer.score(query, documents, instruction=instruction).astype(np.float64), None)
