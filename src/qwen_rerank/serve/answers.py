"""What answers hold, for the description at `/openapi.json`; the answers themselves are built in `shapes`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, RootModel


class Usage(BaseModel):
    """Prompt tokens of all pairs."""

    prompt_tokens: int
    total_tokens: int


class DocumentText(BaseModel):
    """A repeated document."""

    text: str


class Result(BaseModel):
    """One document's place."""

    index: int = Field(description="0-based place in the request.")
    relevance_score: float = Field(description="Probability of relevance, or log-odds where they were asked for.")
    document: DocumentText | str | None = None
    log_odds: float | None = None
    truncated: bool | None = None
    windows: int | None = None
    best_window: list[int] | None = Field(None, description="Character span of the text that gave the score.")


class RerankAnswer(BaseModel):
    """Best first."""

    id: str
    object: str
    model: str
    results: list[Result]
    usage: Usage
    meta: dict[str, Any]
    data: list[Result] | None = None


class InfinityAnswer(BaseModel):
    """Best first, documents as strings."""

    object: str
    id: str
    model: str
    created: int
    results: list[Result]
    usage: Usage


class VoyageAnswer(BaseModel):
    """Best first, under `data`."""

    id: str
    object: str
    model: str
    data: list[Result]
    usage: Usage


class TeiResult(BaseModel):
    """One text's place."""

    index: int
    score: float
    text: str | None = None


class TeiAnswer(RootModel[list[TeiResult]]):
    """Best first."""


class Ranking(BaseModel):
    """One passage's place."""

    index: int
    logit: float


class RankingAnswer(BaseModel):
    """Best first."""

    rankings: list[Ranking]
    usage: Usage


class Score(BaseModel):
    """One pair's score."""

    index: int
    object: str
    score: float


class ScoreAnswer(BaseModel):
    """In input order."""

    id: str
    object: str
    created: int
    model: str
    data: list[Score]
    usage: Usage


class ErrorDetail(BaseModel):
    """What went wrong, for programs."""

    code: str
    message: str
    param: str | None
    type: str


class ErrorAnswer(BaseModel):
    """Every error, on every route; `error` is a plain string where the TEI shape was asked for."""

    detail: str
    message: str
    error: ErrorDetail | str
    error_type: str | None = None
    request_id: str
