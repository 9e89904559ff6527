"""The settings that the LangChain and LlamaIndex adapters share, and the reranker that is built from them on first use."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast
from weakref import WeakValueDictionary

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from qwen_rerank.checks import check_count, check_probability, check_query, check_text
from qwen_rerank.descriptions import Described, build_reranker, build_scorer, check_description, describe
from qwen_rerank.errors import InvalidInputError, RerankError
from qwen_rerank.passages import Aggregate
from qwen_rerank.protocols import FirstStage, SecondStage, SimpleScorer
from qwen_rerank.reranker import LongDocuments, Reranker
from qwen_rerank.sharing import ForkLock, SharedCopies
from qwen_rerank.types import Candidate, RankedDocument

DEFAULT_MODEL = "Qwen/Qwen3-Reranker-0.6B"
_OF_A_MODEL = ("model", "device", "dtype", "template", "max_length", "revision", "deterministic", "quantize", "threads")
_OF_A_RERANKER = ("threshold", "long_documents", "aggregate")
ALL = sys.maxsize  # a count that cuts nothing off


class _LazyPart(SharedCopies):
    """A scorer or reranker that all adapters of the same settings use: made on first use, gone with the last of them."""

    def __init__(self) -> None:
        self.made: SimpleScorer | SecondStage | None = None
        self._making = threading.Lock()  # it is made once, however many threads ask for it first

    def get(self, make: Callable[[], SimpleScorer | SecondStage]) -> SimpleScorer | SecondStage:
        """Return it."""
        with self._making:
            if self.made is None:
                self.made = make()
            return self.made


_parts: WeakValueDictionary[tuple[object, ...], _LazyPart] = WeakValueDictionary()
_finding = ForkLock()


def _checked(check: Callable[[str, Any], Any]) -> BeforeValidator:
    """Return a validator that asks one of our checks, and lets None through."""

    def validate(value: object, info: ValidationInfo) -> object:
        return None if value is None else check(str(info.field_name), value)

    return BeforeValidator(validate)


Count = Annotated[int, _checked(check_count)]
OptionalCount = Annotated[int | None, _checked(check_count)]
OptionalProbability = Annotated[float | None, _checked(check_probability)]
OptionalText = Annotated[str | None, _checked(check_text)]


class RerankSettings(BaseModel):
    """The second stage as a framework's users describe it: a model name, a scorer or a reranker, and how to use it."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str | None = Field(
        default=None,
        frozen=True,
        description="What load_scorer takes: a Qwen3-Reranker checkpoint or another cross-encoder as a hub name or folder, "
        "'pocket', or the address of a rerank server; loaded on first use. "
        f"{DEFAULT_MODEL} where neither scorer nor reranker is given.",
    )
    scorer: Any = Field(
        default=None,
        frozen=True,
        description="A scorer, or any object with name and score(query, documents), instead of a model name.",
    )
    reranker: Any = Field(default=None, frozen=True, description="A Reranker or Cascade, instead of a model name.")
    threshold: OptionalProbability = Field(
        default=None, description="Least score of a result, in [0, 1]; None keeps all."
    )
    instruction: OptionalText = Field(default=None, description="What relevance means; None for the scorer's default.")
    long_documents: LongDocuments = Field(
        default="truncate", description="What happens to a document that does not fit."
    )
    aggregate: Aggregate = Field(default="max", description="How the scores of a long document's windows become one.")
    device: str = Field(default="auto", frozen=True, description="Of the model: 'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", frozen=True, description="Of the model."
    )
    template: Literal["transformers", "vllm"] = Field(default="transformers", frozen=True, description="Of the prompt.")
    max_length: OptionalCount = Field(
        default=None, frozen=True, description="Longest prompt in tokens; None for what the model's class takes."
    )
    revision: str | None = Field(default=None, frozen=True, description="Of a model on the hub.")
    deterministic: bool = Field(
        default=False, frozen=True, description="Scores that depend on nothing else in a batch."
    )
    quantize: Literal["int8"] | None = Field(
        default=None, frozen=True, description="'int8' multiplies in 8 bits on a CPU; of a Qwen3-Reranker."
    )
    threads: OptionalCount = Field(
        default=None, frozen=True, description="Threads of a local model's forward pass on a CPU."
    )

    _lazy: tuple[tuple[object, ...], _LazyPart] | None = PrivateAttr(default=None)  # what is built, and from what

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as exc:
            raise _our_error(type(self), exc) from exc

    @field_validator("scorer", "reranker", mode="before")
    @classmethod
    def _read_part(cls, value: object, info: Any) -> object:
        return check_description(info.field_name, value) if isinstance(value, Mapping) else value

    @field_serializer("scorer", "reranker")
    def _describe_part(self, value: object) -> dict[str, Any] | None:
        return None if value is None else describe(value)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        given = [name for name in ("model", "scorer", "reranker") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInputError(f"Give one of model, scorer and reranker, not {' and '.join(given)}.")
        if self.scorer is not None and not _is_a(self.scorer, SimpleScorer):
            raise InvalidInputError(
                f"scorer must have name and score(query, documents), not be {self.scorer!r:.80}; "
                "a model name goes into model."
            )
        if self.reranker is not None and not _is_a(self.reranker, SecondStage):
            raise InvalidInputError(f"reranker must be a Reranker or Cascade, not {self.reranker!r:.80}.")
        misplaced = self._changed(_OF_A_MODEL if self.scorer is not None else (*_OF_A_MODEL, *_OF_A_RERANKER))
        if misplaced and (self.scorer is not None or self.reranker is not None):
            raise InvalidInputError(f"{given[0]} brings its own {misplaced[0]}; set {misplaced[0]} where you make it.")
        if not self._is_given:
            self._lazy_part()  # held from now on, for the copies that frameworks make of this, use once and forget
        return self

    def __reduce__(self) -> Any:
        """Pickle scorer and reranker as `to_dict` describes them, so that neither a model nor a key travels."""
        data = {name: value for name, value in self if not type(self).model_fields[name].exclude}
        parts = {name: self._describe_part(data[name]) for name in ("scorer", "reranker")}
        return _restored, (type(self), {**data, **parts})

    @property
    def scorer_name(self) -> str:
        """The model or scorer as events and traces show it."""
        return str(self._part.name) if self._part is not None else self.model or DEFAULT_MODEL

    @property
    def _part(self) -> SimpleScorer | SecondStage | Described | None:
        part: SimpleScorer | SecondStage | Described | None = self.scorer if self.reranker is None else self.reranker
        return part

    def _ready(self) -> SecondStage:
        """Return the reranker; over a scorer it is made anew, so that a changed threshold counts at once."""
        built: Any = self._build()
        if self.reranker is not None:
            return cast("SecondStage", built)
        return Reranker(built, threshold=self.threshold, long_documents=self.long_documents, aggregate=self.aggregate)

    @property
    def _is_given(self) -> bool:
        """Whether there is nothing to build."""
        return self._part is not None and not isinstance(self._part, Described)

    @property
    def _is_built(self) -> bool:
        return self._is_given or self._lazy_part().made is not None

    def _build(self) -> SimpleScorer | SecondStage:
        return cast("SimpleScorer", self._part) if self._is_given else self._lazy_part().get(self._make)

    def _lazy_part(self) -> _LazyPart:
        """Return the part of just these settings: a copy may have others, and a forked child builds its own."""
        part = self._part
        described = json.dumps(part.data, sort_keys=True) if isinstance(part, Described) else None
        key = (os.getpid(), described, *(getattr(self, name) for name in _OF_A_MODEL))
        if self._lazy is None or self._lazy[0] != key:
            with _finding:
                self._lazy = (key, _parts.setdefault(key, _LazyPart()))
        return self._lazy[1]

    def _make(self) -> SimpleScorer | SecondStage:
        from qwen_rerank.scorers.loading import load_scorer

        part = self._part
        if isinstance(part, Described):
            return build_scorer(part) if self.reranker is None else build_reranker(part)
        # Only what was set: each kind of model has defaults of its own, and refuses what it does not have.
        settings = {name: getattr(self, name) for name in self._changed(_OF_A_MODEL) if name != "model"}
        return load_scorer(self.model or DEFAULT_MODEL, **settings)

    def _changed(self, names: Sequence[str]) -> list[str]:
        """Return those of `names` whose value is not the default; a description gives every value."""
        return [name for name in names if getattr(self, name) != RerankSettings.model_fields[name].default]


class LazyReranker:
    """A second stage made from settings; a model that they name loads when the first documents come.

    Args:
        settings: Read anew in every call.
    """

    def __init__(self, settings: RerankSettings) -> None:
        self._settings = settings

    @property
    def name(self) -> str:
        """The model or scorer."""
        return self._settings.scorer_name

    @property
    def top_n(self) -> int | None:
        """The reranker's own, where one was given."""
        return own_top_n(self._settings.reranker, None)

    def rerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """Return the candidates, most relevant first; `instruction` is the settings' by default."""
        if not candidates:
            return []
        instruction = self._settings.instruction if instruction is None else instruction
        return self._settings._ready().rerank(query, candidates, top_n=top_n, instruction=instruction)

    async def arerank(
        self,
        query: str,
        candidates: Sequence[Candidate],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedDocument]:
        """As `rerank`, without blocking the event loop, not even while a model loads."""
        if not candidates:
            return []
        instruction = self._settings.instruction if instruction is None else instruction
        if not self._settings._is_built:
            await asyncio.to_thread(self._settings._build)
        return await self._settings._ready().arerank(query, candidates, top_n=top_n, instruction=instruction)

    def rerank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence[Candidate]],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[list[RankedDocument]]:
        """Return `rerank` of every query with its candidates, scored together."""
        instruction = self._settings.instruction if instruction is None else instruction
        return self._settings._ready().rerank_many(queries, candidates, top_n=top_n, instruction=instruction)


class TopNSettings(RerankSettings):
    """Settings of a step that keeps the best of what it is given."""

    top_n: OptionalCount = Field(
        default=3,
        description="How many to return; None for all. Left out, a reranker's own top_n counts where it has one.",
    )

    @model_validator(mode="after")
    def _take_top_n(self) -> Self:
        if "top_n" not in self.model_fields_set:
            self.top_n = own_top_n(self.reranker, self.top_n)
        return self


def check_stages(first_stage: object, base_retriever: object, *, framework: str, retriever: type) -> None:
    """Raise unless there is one of both: a first stage of this package, or a retriever of the framework."""
    if (first_stage is None) == (base_retriever is None):
        raise InvalidInputError("Give either first_stage or base_retriever, and not both.")
    if first_stage is not None and not isinstance(first_stage, FirstStage):
        raise InvalidInputError(
            f"first_stage must have a search method, not be a {type(first_stage).__name__}; "
            f"a {framework} retriever goes into base_retriever."
        )
    if base_retriever is not None and not isinstance(base_retriever, retriever):
        raise InvalidInputError(
            f"base_retriever must be a {framework} retriever, not a {type(base_retriever).__name__}; "
            "a first stage of this package goes into first_stage."
        )


def check_search(query: object, top_k: object, filter: object, *, framework: str) -> str:
    """Return the query of a search by a framework's retriever, which no filter can be passed on to."""
    check_count("top_k", top_k)
    if filter is not None:
        raise InvalidInputError(
            f"filter must be None here; give the {framework} retriever its filter where you make it."
        )
    return check_query(query)


def own_top_n(reranker: SecondStage | Described | None, default: int | None) -> int | None:
    """Return the `top_n` of a reranker, or `default` where there is none."""
    top_n = reranker.top_n if isinstance(reranker, SecondStage) else None
    return default if top_n is None else top_n


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


def _is_a(part: object, kind: type) -> bool:
    """Return whether `part` is of this kind or described as one; a class instead of an instance is not."""
    return isinstance(part, kind | Described) and not isinstance(part, type)


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
