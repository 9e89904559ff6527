"""Requests: bytes → JSON object → one of the schemas. The door of the server: behind it every text is trusted.

JSON is read strictly: UTF-8, finite numbers, no key twice, no lone surrogate, bounded depth and size. In a schema unknown
fields are ignored, every optional field may be null, and numbers are never guessed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from qwen_rerank.reranker import LongDocuments
from qwen_rerank.serve.errors import ApiError

MAX_DEPTH = 64
MAX_KEYS = 100_000
MAX_DIGITS = 400

_JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
}

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the body as a JSON object.

    Raises:
        ApiError: 400 where it is no strict JSON, 413 where it is too complex, 422 where it is no object or holds a text
            that UTF-8 cannot carry.
    """
    if not body.strip():
        raise ApiError(400, "empty_body", "the body is empty; send a JSON object.")
    value = _parse(_decode(body))
    if not isinstance(value, dict):
        raise ApiError(422, "invalid_request", f"the body must be a JSON object, not {_JSON_NAMES[type(value)]}.")
    _check_depth(value)
    if _SURROGATE_ESCAPE.search(body):
        _check_surrogates(value)
    return value


def _decode(body: bytes) -> str:
    if body.startswith(b"\xef\xbb\xbf"):
        raise ApiError(400, "invalid_encoding", "the body starts with a byte order mark; send plain UTF-8.")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ApiError(400, "invalid_encoding", f"the body is not UTF-8 (byte {exc.start}).") from exc


def _parse(text: str) -> Any:
    keys = 0

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal keys
        keys += len(items)
        if keys > MAX_KEYS:
            raise ApiError(413, "too_many_keys", f"the body holds more than {MAX_KEYS} keys.")
        found = dict(items)
        if len(found) != len(items):
            raise ApiError(400, "duplicate_key", "an object of the body has the same key twice.")
        return found

    try:
        return json.loads(
            text, object_pairs_hook=pairs, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite
        )
    except RecursionError as exc:
        raise ApiError(400, "too_deep", f"the body is nested deeper than {MAX_DEPTH} levels.") from exc
    except ValueError as exc:
        place = f" at character {exc.pos}" if isinstance(exc, json.JSONDecodeError) else ""
        raise ApiError(400, "invalid_json", f"the body is not valid JSON{place}.") from exc


def _no_constant(_: str) -> float:
    raise ApiError(400, "non_finite_number", "NaN and Infinity are no JSON numbers.")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ApiError(400, "number_too_long", f"a number of the body has more than {MAX_DIGITS} digits.")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ApiError(400, "non_finite_number", "a number of the body is too large.")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ApiError(400, "too_deep", f"the body is nested deeper than {MAX_DEPTH} levels.")


def _check_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            _check_encodable(node)
        elif isinstance(node, dict):
            waiting += [*node.keys(), *node.values()]
        elif isinstance(node, list):
            waiting += node


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        message = "a text of the body holds a lone surrogate, which UTF-8 cannot carry."
        raise ApiError(422, "invalid_unicode", message) from exc


_STRING = {"type": "string"}
_FULL_STRING = {"type": "string", "pattern": r"\S"}
_TEXT_OBJECT = {"type": "object", "properties": {"text": _STRING}, "required": ["text"]}


def _text_of(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        value = value["text"]
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string or an object with a string `text`")
    return value


def _query_of(value: Any) -> str:
    text = _text_of(value)
    if not text.strip():
        raise PydanticCustomError("query", "must hold more than white space")
    return text


def _boolean(value: Any) -> Any:
    # Some clients send "true" and "false" as strings.
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _settings_of(value: Any) -> Any:
    # Xinference's client sends further settings as a JSON string.
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except (ValueError, RecursionError):
        raise PydanticCustomError("settings", "must be an object, or a string that holds a JSON object") from None


Text = Annotated[str, BeforeValidator(_text_of), WithJsonSchema({"anyOf": [_STRING, _TEXT_OBJECT]})]
Query = Annotated[
    str,
    BeforeValidator(_query_of),
    WithJsonSchema({"anyOf": [_FULL_STRING, {**_TEXT_OBJECT, "properties": {"text": _FULL_STRING}}]}),
]
Flag = Annotated[
    bool,
    BeforeValidator(_boolean),
    Field(strict=True),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["true", "false", "True", "False"]}]}),
]
Count = Annotated[StrictInt, Field(ge=1)]
OneOrMany = Annotated[
    list[Text],
    BeforeValidator(_one_or_many),
    Field(min_length=1),
]
Extras = Annotated[dict[str, Any], BeforeValidator(_settings_of)]


class ScoringBody(BaseModel):
    """The fields that every scoring route takes."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, protected_namespaces=())

    model: StrictStr | None = Field(None, description="A served name; may be left out.")
    instruction: StrictStr | None = Field(
        None,
        validation_alias=AliasChoices("instruction", "instruct"),
        description="What counts as relevant; `instruct` is another name. Empty: the server's default.",
    )
    chat_template_kwargs: Extras | None = Field(None, description="Only `instruction` is read from it.")
    kwargs: Extras | None = Field(None, description="As `chat_template_kwargs`, or the same as a JSON string.")
    use_activation: Flag | None = Field(None, description="false: scores are log-odds instead of probabilities.")
    raw_scores: Flag | None = Field(None, description="true: scores are log-odds instead of probabilities.")
    truncate: Flag | None = Field(None, description="false: an over-long document is an error.")
    truncation: Flag | None = Field(None, description="Voyage's name for `truncate`.")
    truncation_side: Literal["right"] | None = Field(None, description="Only the end of a document is ever cut.")
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = Field(
        None, description="Longest prompt in tokens; the document is cut to fit, never the query. -1: the model's."
    )
    max_tokens_per_doc: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="Longest document in tokens; the rest of it is not read. 0: no limit."
    )
    long_documents: LongDocuments | None = Field(None, description="What happens to an over-long document.")

    @property
    def wanted_instruction(self) -> str | None:
        """The instruction, wherever the client put it."""
        for source in (self.instruction, (self.chat_template_kwargs or {}).get("instruction")):
            if isinstance(source, str) and source.strip():
                return source
        inner = (self.kwargs or {}).get("instruction")
        return inner if isinstance(inner, str) and inner.strip() else None

    @property
    def wants_log_odds(self) -> bool:
        """Whether scores are log-odds."""
        return self.raw_scores is True or self.use_activation is False

    @property
    def wanted_long_documents(self) -> LongDocuments | None:
        """The treatment of over-long documents, if the request names one."""
        return self.long_documents or ("error" if False in (self.truncate, self.truncation) else None)


class RerankRequest(ScoringBody):
    """Jina's, Cohere's, vLLM's, Voyage's and Infinity's request."""

    query: Query
    documents: list[Text] = Field(min_length=1)
    top_n: Count | None = Field(None, description="Longest result; above the number of documents it means all.")
    top_k: Count | None = Field(None, description="Voyage's name for `top_n`; the answer then has `data` too.")
    return_documents: Flag | None = Field(None, description="Repeat each document in its result; false by default.")
    return_details: Flag | None = Field(
        None, description="Add `truncated`, `windows`, `best_window` and `log_odds` to each result."
    )

    @property
    def limit(self) -> int | None:
        """Longest result."""
        return self.top_n if self.top_n is not None else self.top_k


class TeiRequest(ScoringBody):
    """Text Embeddings Inference's request."""

    query: Query
    texts: list[Text] = Field(min_length=1)
    top_n: Count | None = None
    return_text: Flag | None = None
    truncation_direction: Literal["right", "Right"] | None = None


class RankingRequest(ScoringBody):
    """NVIDIA NIM's request."""

    query: Query
    passages: list[Text] = Field(min_length=1)
    truncate: Literal["NONE", "END"] | None = None  # type: ignore[assignment]

    @property
    def wanted_long_documents(self) -> LongDocuments | None:
        """NONE means that an over-long passage is an error."""
        return self.long_documents or ("error" if self.truncate == "NONE" else None)


class PairsRequest(ScoringBody):
    """vLLM's request for the scores of pairs: 1:1, 1:N or N:N."""

    queries: OneOrMany = Field(validation_alias=AliasChoices("queries", "data_1", "text_1"))
    documents: OneOrMany = Field(validation_alias=AliasChoices("documents", "items", "data_2", "text_2"))


class SearchRequest(ScoringBody):
    """The playground's request: both rounds over a sample collection or over the reader's own texts."""

    query: Query
    collection: Literal["en", "zh"] | None = None
    texts: list[Text] | None = None
    top_k: Annotated[StrictInt, Field(ge=1, le=100)] = 20


RequestT = TypeVar("RequestT", bound=BaseModel)


def read(kind: type[RequestT], body: dict[str, Any]) -> RequestT:
    """Return the body as a request.

    Raises:
        ApiError: 422 with the first field at fault as `param`.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _param(first["loc"])
        message = f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}." if param else f"{first['msg']}."
        raise ApiError(422, first["type"], message, param=param or None) from exc


def _param(loc: tuple[int | str, ...]) -> str:
    names = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(names).lstrip(".")
