"""A scorer or reranker as plain data and back: what `to_dict` writes and `from_dict` reads.

Only the classes named here are ever built from a description; nothing in it is imported, unpickled or executed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

from qwen_rerank.calibration import Calibration
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import Scorer
from qwen_rerank.reranker import Reranker

_HOMES = {
    "CrossEncoderScorer": "qwen_rerank.scorers.cross_encoder",
    "HttpScorer": "qwen_rerank.scorers.http",
    "QwenScorer": "qwen_rerank.scorers.qwen",
}


@dataclass(frozen=True, slots=True)
class Described:
    """A scorer or reranker that is known by its description and not yet built.

    Attributes:
        name: Its class.
        data: The description, checked.
    """

    name: str
    data: Mapping[str, Any]


def describe(part: Any) -> dict[str, Any]:
    """Return a scorer or reranker as JSON data: its class and configuration, never a key.

    A class that is not ours is named, but its description cannot be turned back into it.
    """
    if isinstance(part, Described):
        return dict(part.data)
    if type(part) is Reranker:
        settings = {f.name: getattr(part, f.name) for f in fields(part) if f.init and f.name != "scorer"}
        settings["calibration"] = None if part.calibration is None else asdict(part.calibration)
        return {"class": "Reranker", "scorer": describe(part.scorer), "config": _plain(settings)}
    if not _is_ours(part):
        return {"class": f"{type(part).__module__}.{type(part).__qualname__}"}
    return {"class": type(part).__name__, "config": _plain(asdict(part.config))}  # no config of ours holds a key


def check_description(name: str, data: Mapping[str, Any]) -> Described:
    """Return `data` if `build_scorer` or `build_reranker` could make something of it.

    Args:
        name: The argument it came in: "scorer" or "reranker".
        data: What `describe` gave.

    Raises:
        InvalidInputError: If it describes a class that cannot be rebuilt, or is no description.
    """
    inner = data
    if name == "reranker":
        inner = data["scorer"] if data.get("class") == "Reranker" and isinstance(data.get("scorer"), Mapping) else {}
    if str(inner.get("class")) not in _HOMES:
        raise InvalidInputError(
            f"{name} was described as {inner.get('class') or data.get('class')!r}, which cannot be rebuilt from a "
            f"description; pass the {name} itself, as in from_dict(data, {name}=...)."
        )
    if not isinstance(data.get("config"), Mapping) or not isinstance(inner.get("config"), Mapping):
        raise InvalidInputError(f"{name} must be described with its configuration under 'config'.")
    return Described(str(data["class"]), data)


def build_scorer(described: Described) -> Scorer:
    """Return the scorer that `described` tells of.

    Raises:
        InvalidInputError: If its configuration has an unknown entry.
    """
    make = getattr(import_module(_HOMES[described.name]), described.name)
    scorer: Scorer = _call(make, described.data["config"])
    return scorer


def build_reranker(described: Described) -> Reranker:
    """Return the reranker that `described` tells of, with its scorer built.

    Raises:
        InvalidInputError: If a configuration has an unknown entry.
    """
    config = dict(described.data["config"])
    if config.get("calibration") is not None:
        config["calibration"] = _call(Calibration, _tupled(config["calibration"]))
    inner = described.data["scorer"]
    reranker: Reranker = _call(Reranker, {**config, "scorer": build_scorer(Described(inner["class"], inner))})
    return reranker


def _is_ours(part: object) -> bool:
    """Return whether `part` is of exactly one of our scorer classes; a subclass may need more than its configuration."""
    kind = type(part)
    return kind.__module__.startswith(_HOMES.get(kind.__name__, " "))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as JSON gives them back, so that a description is the same before and after a file."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))  # a Path, a torch.device
    return plain


def _tupled(values: Any) -> Any:
    """Return `values` with tuples for the lists that JSON made of them."""
    if not isinstance(values, Mapping):
        return values
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _call(make: Any, config: Mapping[str, Any]) -> Any:
    if not isinstance(config, Mapping):
        raise InvalidInputError(f"the description of a {make.__name__} must be a mapping, not {config!r:.80}.")
    try:
        inspect.signature(make).bind(**config)
    except TypeError as exc:
        raise InvalidInputError(f"the description does not fit {make.__name__}: {exc}.") from exc
    return make(**config)
