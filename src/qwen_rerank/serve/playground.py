"""The playground at `/`: both rounds side by side, for a newcomer. Its files are public, its searches need the key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.excerpts import place_of
from qwen_rerank.lexical import BM25Index, terms
from qwen_rerank.pipeline import TwoStageRetriever
from qwen_rerank.protocols import FirstStage
from qwen_rerank.samples import LANGUAGES, Sample, load_demo_results, load_encyclopedia
from qwen_rerank.serve import openapi
from qwen_rerank.serve.backend import Backend
from qwen_rerank.serve.errors import ApiError
from qwen_rerank.serve.responses import json_response, page_response
from qwen_rerank.serve.schemas import SearchRequest, has_text
from qwen_rerank.serve.scoring import Scoring
from qwen_rerank.serve.store_search import Run, ServerSecondStage, Turns, check_answer, no_store, plain_number
from qwen_rerank.types import Candidate, Document, RankedDocument

MAX_TEXTS = 200
MAX_CHARS = 400_000  # of all texts: the first stage reads every word


class Read(Protocol):
    """Reads a request's body."""

    async def __call__(self, request: Request, kind: type[SearchRequest], *, most: int) -> SearchRequest:
        """Return it, with at most so many texts."""
        ...


class Playground:
    """The page and its searches.

    Args:
        backend: Tells which model is behind it.
        run: Scores jobs as any other route does.
        read: Reads a request's body as any other route does.
        turns: At a first stage of the server's own, which is the collection "store".
    """

    static_paths = frozenset({"/", "/playground/samples"})

    def __init__(self, backend: Backend, run: Run, read: Read, turns: Turns | None = None) -> None:
        self._backend = backend
        self._run = run
        self._read = read
        self._turns = turns

    def add_routes(self, app: FastAPI, extra: Callable[..., dict[str, Any]]) -> None:
        """Add the page, its samples and its search."""
        app.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/playground/samples", self.samples, methods=["GET"], include_in_schema=False)
        options = {"openapi_extra": extra(SearchRequest), "include_in_schema": False}
        app.add_api_route(
            "/playground/search", self.search, methods=["POST"], **openapi.documented(options, "/playground/search")
        )

    async def page(self) -> Response:
        """Return the page."""
        body, style, script = _page_parts()
        return page_response("qwen-rerank playground", body, style=style, script=script)

    async def samples(self) -> Response:
        """Return of each sample collection its questions, those to begin with, and what reranking gained over all of them."""
        return json_response({**_samples(), "has_store": self._turns is not None})

    async def search(self, request: Request) -> Response:
        """Recall candidates, rank them, and show the prompt of the best one."""
        wanted = await self._read(request, SearchRequest, most=MAX_TEXTS)
        first_stage, second_stage = self._first_stage(wanted), ServerSecondStage(self._run, request, wanted)
        line = TwoStageRetriever(first_stage, second_stage, top_k=wanted.top_k, top_n=wanted.top_k)
        scoring = self._backend.scoring
        rounds = await line.aretrieve_rounds(wanted.query, instruction=wanted.wanted_instruction)
        of_files = wanted.collection == "store"
        searched = first_stage.store if isinstance(first_stage, Turns) else first_stage
        check_answer(sum(len(candidate.document.text) for candidate in rounds.candidates), param="top_k")
        first = [
            {
                "id": candidate.document.id,
                "text": candidate.document.text,
                "score": plain_number(candidate.score),
                "place": place_of(candidate.document) if of_files else None,
            }
            for candidate in rounds.candidates
        ]
        final = [
            {"index": hit.index, "score": hit.score, "log_odds": hit.log_odds, "truncated": hit.truncated}
            for hit in rounds.ranked
        ]
        answer = {
            "model": self._backend.names.reported,
            "first_stage": "store" if of_files else "BM25",
            "first": first,
            "final": final,
            "right": _right(wanted, rounds.candidates),
            "terms": terms(wanted.query),
            "n_documents": len(searched) if isinstance(searched, Sized) else None,
            "prompt": _prompt(scoring, wanted, rounds.ranked[0]) if rounds.ranked else None,
        }
        return await asyncio.to_thread(json_response, answer)

    def _first_stage(self, wanted: SearchRequest) -> FirstStage:
        if wanted.collection != "store":
            return _first_stage(wanted)
        if self._turns is None:
            raise no_store("collection")
        return self._turns


@lru_cache(maxsize=1)
def _page_parts() -> tuple[str, str, str]:
    folder = files("qwen_rerank.serve").joinpath("static")
    body, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("playground.html", "playground.css", "playground.js")
    )
    return body, style, script


@lru_cache(maxsize=1)
def _samples() -> dict[str, Any]:
    made, samples = load_demo_results(), {}
    for language in LANGUAGES:
        (sample, _), cases = _sample(language), made["bm25"]["cases"][language]
        texts = {document.id: document.text for document in sample.documents}
        samples[language] = {
            "queries": cases,  # the last is one where the second round does not help
            "questions": list(sample.queries),
            "count": {"model": made["model"], **made["bm25"]["counts"][language]},
            "own": {"query": cases[0], "texts": [texts[sample.relevant[case]] for case in cases]},
        }
    return samples


@lru_cache(maxsize=len(LANGUAGES))
def _sample(language: str) -> tuple[Sample, _FirstStage]:
    sample = load_encyclopedia(language)
    return sample, _FirstStage(sample.documents)


def _first_stage(wanted: SearchRequest) -> _FirstStage:
    if wanted.collection is not None:
        return _sample(wanted.collection)[1]
    texts = list(filter(has_text, wanted.texts or []))
    if not texts:
        raise ApiError(422, "no_texts", "choose a collection or give at least one text.", param="texts")
    if sum(map(len, (wanted.query, *texts))) > MAX_CHARS:
        message = f"the playground takes {MAX_CHARS} characters at most; use /v1/rerank for more."
        raise ApiError(413, "too_many_characters", message, param="texts")
    return _FirstStage([Document(str(place), text) for place, text in enumerate(texts)])


def _right(wanted: SearchRequest, candidates: Sequence[Candidate]) -> dict[str, int | None] | None:
    """Return where among the candidates the passage stands that answers a sample's question; None for other queries."""
    if wanted.collection is None or wanted.collection == "store":
        return None
    right = _sample(wanted.collection)[0].relevant.get(wanted.query)
    if right is None:
        return None
    return {"index": next((i for i, found in enumerate(candidates) if found.document.id == right), None)}


class _FirstStage:
    """BM25, with the documents without a word of the query behind it, in their own order."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def _index(self) -> BM25Index:
        return BM25Index(self.documents)

    def search(self, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None) -> list[Candidate]:
        try:
            found = self._index.search(query, top_k, filter=filter)
        except InvalidInputError:
            found = []
        known = {candidate.document.id for candidate in found}
        rest = [document for document in self.documents if document.id not in known][: top_k - len(found)]
        return found + [Candidate(document, 0.0, len(found) + place) for place, document in enumerate(rest, start=1)]


def _prompt(scoring: Scoring, wanted: SearchRequest, best: RankedDocument) -> list[dict[str, str]] | None:
    """Return the parts of the best document's prompt in order, or None where the scorer has no prompts to be seen."""
    encoder, instruction = scoring.scorer.encoder, scoring.instruction(wanted.wanted_instruction)
    if encoder is None:
        return None
    spec = encoder.spec
    start, stop = best.best_window or (0, None)
    parts = [
        ("fixed", spec.prefix + spec.instruction_label),
        ("instruction", encoder.instruction if instruction is None else instruction),
        ("fixed", spec.separator + spec.query_label),
        ("query", wanted.query),
        ("fixed", spec.separator + spec.document_label),
        ("document", best.document.text[start:stop]),
        ("fixed", spec.suffix),
    ]
    return [{"kind": kind, "text": text} for kind, text in parts]
