"""The description at `/openapi.json`, and the page at `/docs` that shows it without anything from elsewhere."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, TypeAdapter

from qwen_rerank.serve import responses
from qwen_rerank.serve.errors import ErrorAnswer
from qwen_rerank.serve.responses import page_response

DESCRIPTION = (
    "Ranks documents by relevance to a query. `/v1/rerank`, `/v2/rerank` and `/rerank` are one route that answers in "
    "the shape of the request: `documents` as Jina, Cohere and vLLM do (with `top_k` also Voyage's `data`), `texts` as "
    "Text Embeddings Inference, `passages` as NVIDIA NIM, `input` as Mixedbread. Unknown fields are ignored, optional fields may be null. "
    "Documents are not repeated unless `return_documents` is true. `X-Request-Timeout-Ms` shortens the deadline."
)

_ERRORS = {
    400: "The body is no strict JSON.",
    401: "No valid API key.",
    404: "No such route or model.",
    405: "The route does not take this method.",
    408: "The request came too slowly.",
    413: "Too many bytes, documents or tokens.",
    415: "Not plain UTF-8 JSON.",
    422: "A field is wrong; `error.param` names it.",
    429: "The queue is full; see `Retry-After`.",
    500: "An internal error.",
    502: "The model failed.",
    503: "Not ready or shutting down; see `Retry-After`.",
    504: "The deadline passed.",
}
_GET_ERRORS = (401, 404, 405, 503)

_ANSWERS: dict[str, Any] = {
    "/score": responses.ScoreAnswer,
    "/v1/score": responses.ScoreAnswer,
    "/v1/ranking": responses.RankingAnswer,
    "/tei/rerank": list[responses.TeiResult],
    "/infinity/rerank": responses.InfinityAnswer,
    "/voyage/v1/rerank": responses.VoyageAnswer,
    "/v1/models": responses.ModelList,
    "/models": responses.ModelList,
    "/infinity/models": responses.ModelList,
    "/info": responses.Info,
    "/tei/info": responses.Info,
    "/health": responses.Health,
    "/health/live": responses.Health,
    "/health/ready": responses.Health,
    "/v1/search": responses.StoreSearchAnswer,
    "/playground/search": dict[str, Any],
}
_LISTS = ("documents", "texts", "passages")  # of the requests of one route, the first that is there decides
_RERANK_ANSWER = (
    responses.RerankAnswer
    | list[responses.TeiResult]
    | responses.RankingAnswer
    | responses.MixedbreadAnswer
    | responses.PineconeAnswer
)
_TEXT_PAGES = {"/metrics": "text/plain", "/docs": "text/html"}


@cache
def extra(*requests: type[BaseModel]) -> dict[str, Any]:
    """Return the description of a body that is one of `requests`; the first wins where several would fit."""
    schemas = [request.model_json_schema() for request in requests]
    for place, schema in enumerate(schemas):
        schema["properties"] |= dict.fromkeys(_LISTS[:place], False)
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def documented(options: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a route's options with its answers described."""
    takes_body = "openapi_extra" in options
    answers, _ = _schemas()
    described: dict[int | str, dict[str, Any]] = {
        code: {"description": text, "content": _content(answers["error"])}
        for code, text in _ERRORS.items()
        if takes_body or code in _GET_ERRORS
    }
    if path in _TEXT_PAGES:
        described[200] = {"description": "A page.", "content": {_TEXT_PAGES[path]: {"schema": {"type": "string"}}}}
    else:
        described[200] = {"description": "The answer.", "content": _content(answers.get(path, answers["rerank"]))}
    return {**options, "responses": described, "response_model": None, "response_class": _class(path)}


@cache
def _schemas() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of every route's answer, and the components that they refer to."""
    kinds = {**_ANSWERS, "rerank": _RERANK_ANSWER, "error": ErrorAnswer}
    schemas, components = TypeAdapter.json_schemas(
        [(name, "serialization", TypeAdapter(kind)) for name, kind in kinds.items()],
        ref_template="#/components/schemas/{model}",
    )
    return {name: schema for (name, _), schema in schemas.items()}, components["$defs"]


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _class(path: str) -> type[Response]:
    return {"/metrics": PlainTextResponse, "/docs": HTMLResponse}.get(path, JSONResponse)


def install(app: FastAPI, *, with_keys: bool, public: Collection[str]) -> None:
    """Make the app's description say where a key is needed."""
    make = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(_schemas()[1])
            if with_keys:
                _describe_keys(schema, public)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _describe_keys(schema: dict[str, Any], public: Collection[str]) -> None:
    schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            if path not in public:
                operation["security"] = [{"key": []}]


def docs_page(app: FastAPI) -> Response:
    """Return the description as one plain page."""
    schema = app.openapi()
    rows = [
        _operation(path, method, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    body = (
        f"<main><h1>{html.escape(schema['info']['title'])} {html.escape(schema['info']['version'])}</h1>"
        f"<p>{_coded(schema['info']['description'])}</p>{''.join(rows)}"
        "<p>For programs: <a href='openapi.json'>openapi.json</a></p></main>"
    )
    return page_response("qwen-rerank: routes", body, style=_STYLE)


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    fields = f"<pre>{html.escape(json.dumps(body, indent=2, ensure_ascii=False))}</pre>" if body else ""
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code> "
        f"{_coded(operation.get('description', ''))}</summary>{fields}</details>"
    )


def _coded(text: str) -> str:
    """Return a text as HTML in which what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
summary { cursor: pointer; padding: .4rem 0; }
pre { overflow: auto; padding: 1rem; border: 1px solid #8886; border-radius: 8px; font-size: 13px; }
"""
