"""What the LangChain and LlamaIndex adapters share: their settings, and a reranker that is built on first use."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from qwen_rerank.checks import check_count, check_probability, check_text
from qwen_rerank.descriptions import Described, build_reranker, build_scorer, check_description, describe
from qwen_rerank.errors import InvalidInputError, RerankError
from qwen_rerank.passages import Aggregate
from qwen_rerank.protocols import FirstStage, Scorer
from qwen_rerank.reranker import LongDocuments, Reranker
from qwen_rerank.types import Candidate, RankedDocument

DEFAULT_MODEL = "Qwen/Qwen3-Reranker-0.6B"
_OF_A_MODEL = ("model", "device", "dtype", "template", "max_length", "revision", "deterministic")
_OF_A_RERANKER = ("threshold", "long_documents", "aggregate")
_building = threading.Lock()  # a model is loaded once, however many threads ask for it first


class RerankSettings(BaseModel):
    """The second stage as a framework's users describe it: a model name, a scorer or a reranker, and how to use it."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str | None = Field(
        default=None,
        frozen=True,
        description="Qwen3-Reranker checkpoint, as a hub name, a folder or 'pocket'; loaded on first use. "
        f"{DEFAULT_MODEL} where neither scorer nor reranker is given.",
    )
    scorer: Any = Field(default=None, frozen=True, description="A scorer, instead of a model name.")
    reranker: Any = Field(default=None, frozen=True, description="A Reranker or Cascade, instead of a model name.")
    threshold: float | None = Field(default=None, description="Least score of a result, in [0, 1]; None keeps all.")
    instruction: str | None = Field(default=None, description="What relevance means; None for the scorer's default.")
    long_documents: LongDocuments = Field(
        default="truncate", description="What happens to a document that does not fit."
    )
    aggregate: Aggregate = Field(default="max", description="How the scores of a long document's windows become one.")
    device: str = Field(default="auto", frozen=True, description="Of the model: 'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", frozen=True, description="Of the model."
    )
    template: Literal["transformers", "vllm"] = Field(default="transformers", frozen=True, description="Of the prompt.")
    max_length: int = Field(default=8192, frozen=True, description="Longest prompt of the model, in tokens.")
    revision: str | None = Field(default=None, frozen=True, description="Of a model on the hub.")
    deterministic: bool = Field(
        default=False, frozen=True, description="Scores that depend on nothing else in a batch."
    )

    _built: Any = PrivateAttr(default=None)  # the scorer, or the reranker where one was given

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as exc:
            raise _our_error(type(self), exc) from exc

    @field_validator("scorer", "reranker", mode="before")
    @classmethod
    def _read_part(cls, value: object, info: Any) -> object:
        return check_description(info.field_name, value) if isinstance(value, Mapping) else value

    @field_validator("threshold", mode="before")
    @classmethod
    def _check_threshold(cls, value: object) -> float | None:
        return None if value is None else check_probability("threshold", value)

    @field_validator("instruction", mode="before")
    @classmethod
    def _check_instruction(cls, value: object) -> str | None:
        return None if value is None else check_text("instruction", value)

    @field_validator("max_length", mode="before")
    @classmethod
    def _check_max_length(cls, value: object) -> int:
        return check_count("max_length", value)

    @field_serializer("scorer", "reranker")
    def _describe_part(self, value: object) -> dict[str, Any] | None:
        return None if value is None else describe(value)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        given = [name for name in ("model", "scorer", "reranker") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInputError(f"Give one of model, scorer and reranker, not {' and '.join(given)}.")
        if self.scorer is not None and not isinstance(self.scorer, Scorer | Described):
            raise InvalidInputError(f"scorer must be a Scorer, not {self.scorer!r:.80}; a model name goes into model.")
        if self.reranker is not None and not isinstance(self.reranker, Described) and not _can_rerank(self.reranker):
            raise InvalidInputError(f"reranker must be a Reranker or Cascade, not {self.reranker!r:.80}.")
        misplaced = self._changed(_OF_A_MODEL if self.scorer is not None else (*_OF_A_MODEL, *_OF_A_RERANKER))
        if misplaced and (self.scorer is not None or self.reranker is not None):
            raise InvalidInputError(f"{given[0]} brings its own {misplaced[0]}; set {misplaced[0]} where you make it.")
        return self

    def __reduce__(self) -> Any:
        """Pickle scorer and reranker as `to_dict` describes them, so that neither a model nor a key travels."""
        data = {name: value for name, value in self if not type(self).model_fields[name].exclude}
        parts = {name: self._describe_part(data[name]) for name in ("scorer", "reranker")}
        return _restored, (type(self), {**data, **parts})

    @property
    def scorer_name(self) -> str:
        """The model or scorer as events and traces show it."""
        if self.reranker is None and self.scorer is None:
            return self.model or DEFAULT_MODEL
        part = self.scorer if self.reranker is None else _last_stage(self.reranker)
        return str(getattr(getattr(part, "scorer", part), "name", type(part).__name__))

    def rank(self, query: str, candidates: Sequence[Candidate], top_n: int | None) -> list[RankedDocument]:
        """Return what `Reranker.rerank` gives; the first call builds the scorer and loads its model."""
        hits: list[RankedDocument] = self._ready().rerank(query, candidates, top_n=top_n, instruction=self.instruction)
        return hits

    async def arank(self, query: str, candidates: Sequence[Candidate], top_n: int | None) -> list[RankedDocument]:
        """As `rank`, without blocking the event loop, not even while a model loads."""
        if self._built is None:
            await asyncio.to_thread(self._build)
        hits: list[RankedDocument] = await self._ready().arerank(
            query, candidates, top_n=top_n, instruction=self.instruction
        )
        return hits

    def _ready(self) -> Any:
        """Return the reranker; over a scorer it is made anew, so that a changed threshold counts at once."""
        built = self._build()
        if self.reranker is not None:
            return built
        return Reranker(built, threshold=self.threshold, long_documents=self.long_documents, aggregate=self.aggregate)

    def _build(self) -> Any:
        if self._built is None:
            with _building:
                if self._built is None:
                    self._built = self._make()
        return self._built

    def _make(self) -> Any:
        if isinstance(self.reranker, Described):
            return build_reranker(self.reranker)
        if isinstance(self.scorer, Described):
            return build_scorer(self.scorer)
        if self.reranker is not None:
            return self.reranker
        return self.scorer if self.scorer is not None else self._make_model()

    def _make_model(self) -> Scorer:
        from qwen_rerank.scorers.qwen import QwenScorer  # brings torch

        settings = {name: getattr(self, name) for name in _OF_A_MODEL if name != "model"}
        return QwenScorer(self.model or DEFAULT_MODEL, **settings)

    def _changed(self, names: Sequence[str]) -> list[str]:
        """Return those of `names` whose value is not the default; a description gives every value."""
        return [name for name in names if getattr(self, name) != RerankSettings.model_fields[name].default]


def check_top_n(value: object) -> int | None:
    """Return `value` if it is None or a count of at least 1."""
    return None if value is None else check_count("top_n", value)


def own_top_n(reranker: Any, default: int | None) -> int | None:
    """Return the `top_n` of a reranker or of a cascade's last stage, or `default` where there is none."""
    top_n: int | None = getattr(_last_stage(reranker), "top_n", None)
    return default if top_n is None else top_n


async def search_async(
    stage: FirstStage, query: str, top_k: int, *, filter: Mapping[str, Any] | None = None
) -> list[Candidate]:
    """Return `stage.search`, by its own `asearch` where it has one, else in a thread."""
    asearch = getattr(stage, "asearch", None)
    if asearch is None:
        return await asyncio.to_thread(stage.search, query, top_k, filter=filter)
    found: list[Candidate] = await asearch(query, top_k, filter=filter)
    return found


def copied(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a copy that shares nothing with `values` but what cannot be copied, such as a lock or a connection."""
    return {key: _copied(value) for key, value in values.items()}


def score_of(hit: RankedDocument) -> float | None:
    """Return the score as a Python float; None for a document that could not be scored."""
    return None if hit.error is not None else float(hit.score)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever a foreign __deepcopy__ or __reduce__ raises
        return value


def _last_stage(reranker: Any) -> Any:
    """Return the last stage of a cascade, or the reranker itself."""
    return getattr(reranker, "stages", [reranker])[-1]


def _can_rerank(part: object) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("rerank", "arerank"))


def _restored(cls: type[RerankSettings], data: Mapping[str, Any]) -> RerankSettings:
    return cls(**data)


def _our_error(cls: type[BaseModel], exc: ValidationError) -> RerankError:
    """Return the first of pydantic's errors as ours; a value is only shown where it is short and plain."""
    first = exc.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RerankError):
        return cause
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return InvalidInputError(f"{cls.__name__} has no parameter {name!r}; it takes {', '.join(cls.model_fields)}.")
    value = first["input"]
    shown = f"{value!r:.80}" if isinstance(value, str | int | float) else type(value).__name__
    return InvalidInputError(f"{name}: {first['msg']}, not {shown}.")
