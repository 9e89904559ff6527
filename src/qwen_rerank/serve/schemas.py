"""Requests: bytes → JSON object → one of the schemas. The door of the server: behind it every text is trusted.

JSON is read strictly: UTF-8, finite numbers, no key twice, no lone surrogate; depth, values and digits are counted before
anything is built. In a schema unknown fields are ignored, every optional field may be null, and numbers are never guessed.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
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
from pydantic_core import PydanticCustomError, from_json

from qwen_rerank.bounded_json import JsonLimitError, check_json
from qwen_rerank.reranker import LongDocuments
from qwen_rerank.serve.errors import ApiError

MAX_SETTINGS_CHARS = 100_000  # of an instruction, and of settings within a text

_JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
}

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_PLACE = re.compile(r"at line \d+ column \d+$")


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the body as a JSON object.

    What it would take to read is known before any of its values is built.

    Raises:
        ApiError: 400 where it is no strict JSON, 413 where it is too complex, 422 where it is no object or holds a text
            that UTF-8 cannot carry.
    """
    if not body or body.isspace():
        raise ApiError(400, "empty_body", "the body is empty; send a JSON object.")
    if body.startswith(b"\xef\xbb\xbf"):
        raise ApiError(400, "invalid_encoding", "the body starts with a byte order mark; send plain UTF-8.")
    try:
        n_keys = check_json(body)
    except JsonLimitError as exc:
        raise ApiError(413 if exc.code == "too_many_values" else 400, exc.code, f"the body {exc}.") from None
    try:
        # From the bytes themselves: a text of the whole body would take four bytes a character for one emoji in it.
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as exc:
        raise _invalid(body, exc) from None
    if not isinstance(value, dict):
        raise ApiError(422, "invalid_request", f"the body must be a JSON object, not {_JSON_NAMES[type(value)]}.")
    _check_values(value, n_keys)
    return value


def _invalid(body: bytes, exc: ValueError) -> ApiError:
    """Return why a body is no JSON, without anything of it."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as no_text:
        return ApiError(400, "invalid_encoding", f"the body is not UTF-8 (byte {no_text.start}).")
    if "hex escape" in str(exc) and _SURROGATE_ESCAPE.search(body):
        message = "a text of the body holds a lone surrogate, which UTF-8 cannot carry."
        return ApiError(422, "invalid_unicode", message)
    place = _PLACE.search(str(exc))
    return ApiError(400, "invalid_json", f"the body is not valid JSON{f' {place[0]}' if place else ''}.")


def _check_values(value: dict[str, Any], n_keys: int) -> None:
    """Refuse a key that came twice, of which only one is left, and numbers beyond the range of floats."""
    waiting: list[Any] = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            n_keys -= len(node)
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
        elif isinstance(node, float) and not math.isfinite(node):
            raise ApiError(400, "non_finite_number", "a number of the body is too large.")
    if n_keys:
        raise ApiError(400, "duplicate_key", "an object of the body has the same key twice.")


_STRING = {"type": "string"}
_FULL_STRING = {"type": "string", "pattern": r"\S"}
_TEXT_OBJECT = {"type": "object", "properties": {"text": _STRING}, "required": ["text"]}


def _text_of(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        value = value["text"]
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string or an object with a string `text`")
    return value


def has_text(value: object) -> bool:
    """Whether this is a string with more than white space in it."""
    return isinstance(value, str) and not (not value or value.isspace())


def _query_of(value: Any) -> str:
    text = _text_of(value)
    if not has_text(text):
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
        if len(value) > MAX_SETTINGS_CHARS:
            raise ValueError
        return parse_object(value.encode()) if value else {}
    except (ValueError, ApiError):
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
Texts = Annotated[list[Text], Field(fail_fast=True)]  # the first that is no text ends the reading
OneOrMany = Annotated[Texts, BeforeValidator(_one_or_many), Field(min_length=1)]
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
        extras = (self.chat_template_kwargs, self.kwargs)
        for source in (self.instruction, *((given or {}).get("instruction") for given in extras)):
            if has_text(source):
                return source
        return None

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
    documents: Texts = Field(min_length=1)
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
    texts: Texts = Field(min_length=1)
    top_n: Count | None = None
    return_text: Flag | None = None
    truncation_direction: Literal["right", "Right"] | None = None


class RankingRequest(ScoringBody):
    """NVIDIA NIM's request."""

    query: Query
    passages: Texts = Field(min_length=1)
    truncate: Literal["NONE", "END"] | None = None  # type: ignore[assignment]

    @property
    def wanted_long_documents(self) -> LongDocuments | None:
        """NONE means that an over-long passage is an error."""
        return self.long_documents or ("error" if self.truncate == "NONE" else None)


class MixedbreadRequest(ScoringBody):
    """Mixedbread's request."""

    query: Query
    input: Texts = Field(min_length=1)
    top_k: Count | None = None
    return_input: Flag | None = None


class PairsRequest(ScoringBody):
    """vLLM's request for the scores of pairs: 1:1, 1:N or N:N."""

    queries: OneOrMany = Field(validation_alias=AliasChoices("queries", "data_1", "text_1"))
    documents: OneOrMany = Field(validation_alias=AliasChoices("documents", "items", "data_2", "text_2"))


class SearchRequest(ScoringBody):
    """The playground's request: both rounds over a sample collection, the server's store, or the reader's own texts."""

    query: Query
    collection: Literal["en", "zh", "store"] | None = None
    texts: Texts | None = None
    top_k: Annotated[StrictInt, Field(ge=1, le=100)] = 20


def _day(value: Any) -> Any:
    if isinstance(value, str):
        try:
            datetime.fromisoformat(value)
        except ValueError:
            raise PydanticCustomError("date", "must be a date such as 2026-05-01") from None
    return value


Day = Annotated[str, BeforeValidator(_day), Field(strict=True, max_length=40)]
Pattern = Annotated[StrictStr, Field(min_length=1, max_length=300)]


class StoreSearchRequest(ScoringBody):
    """A search of the server's store."""

    query: Query
    top_k: Annotated[StrictInt, Field(ge=1)] = Field(100, description="Candidates of the first stage.")
    top_n: Annotated[StrictInt, Field(ge=1, le=100)] = Field(10, description="Longest result.")
    threshold: Annotated[float, Field(strict=True, ge=0, le=1)] | None = Field(None, description="Least score.")
    paths: Annotated[list[Pattern], Field(max_length=20)] | None = Field(
        None, description="Only files that fit one of these, such as `notes/*` or `*.md`."
    )
    suffixes: Annotated[list[Pattern], Field(max_length=20)] | None = Field(
        None, description="Only such files, as `.pdf`."
    )
    since: Day | None = Field(None, description="Only files written on this day or later.")
    until: Day | None = Field(None, description="Only files written on this day or before.")
    context: Annotated[StrictInt, Field(ge=0, le=20)] = Field(0, description="Passages before and after each result.")


RequestT = TypeVar("RequestT", bound=ScoringBody)


# The names under which routes take lists of texts; a client may send others of these, which are ignored.
_TEXT_FIELDS = ("documents", "texts", "passages", "input", "queries", "items", "data_1", "data_2", "text_1", "text_2")


def read(kind: type[RequestT], body: dict[str, Any], *, max_documents: int) -> RequestT:
    """Return the body as a request.

    Raises:
        ApiError: 413 where a list is too long, before any of it is read; 422 with the first field at fault as `param`.
    """
    for name in _TEXT_FIELDS:
        given = body.get(name)
        if isinstance(given, list) and len(given) > max_documents:
            message = f"{len(given)} {name} are more than the {max_documents} of one request."
            raise ApiError(413, "too_many_documents", message, param=name)
    try:
        wanted = kind.model_validate(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _param(first["loc"])
        message = f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}." if param else f"{first['msg']}."
        raise ApiError(422, first["type"], message, param=param or None) from exc
    if len(wanted.wanted_instruction or "") > MAX_SETTINGS_CHARS:
        message = f"instruction: must have at most {MAX_SETTINGS_CHARS} characters."
        raise ApiError(422, "instruction_too_long", message, param="instruction")
    return wanted


def _param(loc: tuple[int | str, ...]) -> str:
    names = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(names).lstrip(".")
