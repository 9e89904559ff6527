"""What requests may hold. Unknown fields are ignored, every optional field may be null, numbers are never guessed."""

from __future__ import annotations

import json
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


class _Body(BaseModel):
    """Fields that every scoring route takes."""

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
        """What happens to over-long documents, if the request says so."""
        return self.long_documents or ("error" if False in (self.truncate, self.truncation) else None)


class RerankRequest(_Body):
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


class TeiRequest(_Body):
    """Text Embeddings Inference's request."""

    query: Query
    texts: list[Text] = Field(min_length=1)
    top_n: Count | None = None
    return_text: Flag | None = None
    truncation_direction: Literal["right", "Right"] | None = None


class RankingRequest(_Body):
    """NVIDIA NIM's request."""

    query: Query
    passages: list[Text] = Field(min_length=1)
    truncate: Literal["NONE", "END"] | None = None  # type: ignore[assignment]

    @property
    def wanted_long_documents(self) -> LongDocuments | None:
        """NONE means that an over-long passage is an error."""
        return self.long_documents or ("error" if self.truncate == "NONE" else None)


class ScoreRequest(_Body):
    """vLLM's request for the scores of pairs: 1:1, 1:N or N:N."""

    queries: OneOrMany = Field(validation_alias=AliasChoices("queries", "data_1", "text_1"))
    documents: OneOrMany = Field(validation_alias=AliasChoices("documents", "items", "data_2", "text_2"))


class SearchRequest(_Body):
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
