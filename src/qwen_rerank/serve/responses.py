"""The server's answers in the shape that each family of clients reads; the same types describe them at `/openapi.json`."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from qwen_rerank.serve.schemas import MixedbreadRequest, RerankRequest, TeiRequest
from qwen_rerank.serve.scoring import RerankResult
from qwen_rerank.types import RankedDocument


class Usage(TypedDict):
    """Prompt tokens of all pairs."""

    prompt_tokens: int
    total_tokens: int


class DocumentText(TypedDict):
    """A repeated document."""

    text: str


class Result(TypedDict):
    """One document's place."""

    index: Annotated[int, Field(description="0-based place in the request.")]
    relevance_score: Annotated[
        float, Field(description="Probability of relevance, or log-odds where they were asked for.")
    ]
    document: NotRequired[DocumentText | str]
    log_odds: NotRequired[float]
    truncated: NotRequired[bool]
    windows: NotRequired[int]
    best_window: NotRequired[
        Annotated[tuple[int, int] | None, Field(description="Character span of the text that gave the score.")]
    ]


class _Answer(TypedDict):
    id: str
    object: str
    model: str
    usage: Usage


class RerankAnswer(_Answer):
    """Best first."""

    results: list[Result]
    meta: dict[str, Any]
    data: NotRequired[list[Result]]


class InfinityAnswer(_Answer):
    """Best first, documents as strings."""

    created: int
    results: list[Result]


class VoyageAnswer(_Answer):
    """Best first, under `data`."""

    data: list[Result]


class TeiResult(TypedDict):
    """One text's place; the answer is a bare list, best first."""

    index: int
    score: float
    text: NotRequired[str]


class Ranked(TypedDict):
    """One document's place, as Mixedbread and Pinecone give it."""

    index: int
    score: float
    object: NotRequired[str]
    input: NotRequired[str]
    document: NotRequired[DocumentText]


class MixedbreadAnswer(TypedDict):
    """Best first, under `data`."""

    object: str
    model: str
    data: list[Ranked]
    usage: Usage
    top_k: int | None
    return_input: bool


class PineconeAnswer(TypedDict):
    """Best first, under `data`."""

    model: str
    data: list[Ranked]
    usage: dict[str, int]


class Ranking(TypedDict):
    """One passage's place."""

    index: int
    logit: float


class RankingAnswer(TypedDict):
    """Best first."""

    rankings: list[Ranking]
    usage: Usage


class Score(TypedDict):
    """One pair's score."""

    index: int
    object: str
    score: float


class ScoreAnswer(_Answer):
    """In input order."""

    created: int
    data: list[Score]


class NeighbourPassage(TypedDict):
    """A passage before or after a result in its file."""

    id: str
    text: str
    heading: str


class RankedPassage(TypedDict):
    """One result of a search of the store."""

    rank: int
    first_stage_rank: int
    place: Annotated[str, Field(description="The file with its line, page, slide, cell or row.")]
    id: str
    score: float
    log_odds: float
    index: Annotated[int, Field(description="0-based place among the candidates.")]
    first_stage_score: float | None
    truncated: bool
    windows: int
    best_window: tuple[int, int] | None
    text: str
    metadata: dict[str, Any]
    above: NotRequired[list[NeighbourPassage]]
    below: NotRequired[list[NeighbourPassage]]


class MovedPassage(TypedDict):
    """A candidate that was among the first `top_n`, and is not after ranking."""

    rank: int
    first_stage_rank: int
    id: str
    score: float
    index: int
    beginning: str


class StoreSearchAnswer(TypedDict):
    """Best first."""

    object: str
    model: str
    searched: Annotated[int | None, Field(description="How many passages the store holds.")]
    candidates: Annotated[int, Field(description="How many of them the first stage found.")]
    results: list[RankedPassage]
    moved_out: list[MovedPassage]


class Model(TypedDict):
    """A served name, as OpenAI describes it, with its type as Xinference does."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    model_type: str


class ModelList(TypedDict):
    """All served names."""

    object: str
    data: list[Model]


class Info(TypedDict):
    """The model, as Text Embeddings Inference describes it."""

    model_id: str
    model_sha: str
    model_type: dict[str, Any]
    max_client_batch_size: int
    max_input_length: int | None
    auto_truncate: bool
    version: str


class Health(TypedDict):
    """Whether the process answers, or takes requests; and then what the self check found."""

    status: str
    model: NotRequired[str]
    checked: NotRequired[list[str]]


def rerank(request: RerankRequest, result: RerankResult, *, request_id: str, model: str) -> RerankAnswer:
    """Return Jina's, Cohere's and vLLM's answer in one; with `data` too where the request speaks Voyage's language."""
    hits = result.best(request.limit)
    answer = RerankAnswer(
        id=request_id,
        # Infinity's client takes no other word, and asks on the same path as all the others.
        object="rerank",
        model=model,
        results=[_result(hit, request, as_object=True) for hit in hits],
        usage=_usage(result.tokens),
        meta={
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": result.tokens, "output_tokens": 0},
        },
    )
    if request.top_k is not None:
        answer["data"] = [_result(hit, request, as_object=False) for hit in hits]
    return answer


def infinity(request: RerankRequest, result: RerankResult, *, request_id: str, model: str) -> InfinityAnswer:
    """Return Infinity's answer."""
    return InfinityAnswer(
        object="rerank",
        id=request_id,
        model=model,
        created=int(time.time()),
        results=[_result(hit, request, as_object=False) for hit in result.best(request.limit)],
        usage=_usage(result.tokens),
    )


def voyage(request: RerankRequest, result: RerankResult, *, request_id: str, model: str) -> VoyageAnswer:
    """Return Voyage's answer."""
    return VoyageAnswer(
        id=request_id,
        object="list",
        model=model,
        data=[_result(hit, request, as_object=False) for hit in result.best(request.limit)],
        usage=_usage(result.tokens),
    )


def mixedbread(request: MixedbreadRequest, result: RerankResult, *, model: str) -> MixedbreadAnswer:
    """Return Mixedbread's answer."""
    data = []
    for hit in result.best(request.top_k):
        score = _score(hit, log_odds=request.wants_log_odds)
        data.append(Ranked(index=hit.index, score=score, object="rank_result"))
        if request.return_input:
            data[-1]["input"] = hit.document.text
    return MixedbreadAnswer(
        object="list",
        model=model,
        data=data,
        usage=_usage(result.tokens),
        top_k=request.top_k,
        return_input=request.return_input is True,
    )


def pinecone(request: RerankRequest, result: RerankResult, *, request_id: str, model: str) -> PineconeAnswer:
    """Return Pinecone's answer."""
    data = []
    for hit in result.best(request.limit):
        data.append(Ranked(index=hit.index, score=_score(hit, log_odds=request.wants_log_odds)))
        if request.return_documents:
            data[-1]["document"] = DocumentText(text=hit.document.text)
    return PineconeAnswer(model=model, data=data, usage={"rerank_units": 1})


def tei(request: TeiRequest, result: RerankResult) -> list[TeiResult]:
    """Return Text Embeddings Inference's answer."""
    answer = []
    for hit in result.best(request.top_n):
        answer.append(TeiResult(index=hit.index, score=_score(hit, log_odds=request.wants_log_odds)))
        if request.return_text:
            answer[-1]["text"] = hit.document.text
    return answer


def ranking(result: RerankResult) -> RankingAnswer:
    """Return NIM's answer, whose scores are log-odds."""
    rankings = [Ranking(index=hit.index, logit=hit.log_odds) for hit in result.ranked]
    return RankingAnswer(rankings=rankings, usage=_usage(result.tokens))


def scores(results: Sequence[RerankResult], *, log_odds: bool, request_id: str, model: str) -> ScoreAnswer:
    """Return vLLM's answer to `/score`: all pairs in input order."""
    hits = [hit for result in results for hit in sorted(result.ranked, key=lambda hit: hit.index)]
    return ScoreAnswer(
        id=request_id,
        object="list",
        created=int(time.time()),
        model=model,
        data=[
            Score(index=index, object="score", score=_score(hit, log_odds=log_odds)) for index, hit in enumerate(hits)
        ],
        usage=_usage(sum(result.tokens for result in results)),
    )


def model(name: str, *, max_length: int | None, started_at: int) -> Model:
    """Return one served name's description."""
    return Model(
        id=name,
        object="model",
        created=started_at,
        owned_by="qwen-rerank",
        max_model_len=max_length,
        model_type="rerank",
    )


def _usage(tokens: int) -> Usage:
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


def _result(hit: RankedDocument, request: RerankRequest, *, as_object: bool) -> Result:
    result = Result(index=hit.index, relevance_score=_score(hit, log_odds=request.wants_log_odds))
    if request.return_documents:
        result["document"] = DocumentText(text=hit.document.text) if as_object else hit.document.text
    if request.return_details:
        result["log_odds"] = hit.log_odds
        result["truncated"] = hit.truncated
        result["windows"] = hit.windows
        result["best_window"] = hit.best_window
    return result


def _score(hit: RankedDocument, *, log_odds: bool) -> float:
    return hit.log_odds if log_odds else hit.score


def json_bytes(value: Any) -> bytes:
    """Return compact JSON: UTF-8, every character as it came, never NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def json_response(value: Any) -> Response:
    """Return a JSON answer."""
    return Response(json_bytes(value), media_type="application/json")


def page_response(title: str, body: str, *, style: str, script: str = "", language: str = "en") -> Response:
    """Return a whole page, which may run its own script and style, talk to its own server, and nothing else.

    Args:
        title: Plain text.
        body: Markup.
        style: CSS as it is.
        script: JavaScript as it is.
        language: Of the body.
    """
    text = (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )
    return Response(text, media_type="text/html; charset=utf-8", headers=page_headers(style=style, script=script))


def page_headers(*, style: str, script: str) -> dict[str, str]:
    """Return the headers that let exactly this style and script run."""
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src '{_hash(style)}'; script-src {repr(_hash(script)) if script else repr('none')}"
    )
    return {"content-security-policy": policy, "cache-control": "no-cache", "x-frame-options": "DENY"}


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
