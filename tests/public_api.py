"""The public names with their signatures, one line or more each: `python -m tests.public_api` writes them down."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = Path(__file__).with_suffix(".txt")
MODULES = (
    "qwen_rerank",
    "qwen_rerank.langchain",
    "qwen_rerank.llama_index",
    "qwen_rerank.errors",
    "qwen_rerank.types",
    "qwen_rerank.protocols",
    "qwen_rerank.calibration",
    "qwen_rerank.prompt",
    "qwen_rerank.samples",
    "qwen_rerank.testing",
    "qwen_rerank.documents",
    "qwen_rerank.folders",
    "qwen_rerank.embedders",
    "qwen_rerank.store",
    "qwen_rerank.scorers.base",
    "qwen_rerank.scorers.qwen",
    "qwen_rerank.scorers.cross_encoder",
    "qwen_rerank.scorers.http",
    "qwen_rerank.scorers.pool",
    "qwen_rerank.scorers.cached",
    "qwen_rerank.serve.app",
    "qwen_rerank.serve.process",
    "qwen_rerank.serve.settings",
    "qwen_rerank.capacity",
    "qwen_rerank.bulk",
    "qwen_rerank.check",
    "qwen_rerank.training",
    "qwen_rerank.evaluation.cache",
    "qwen_rerank.evaluation.calibrate",
    "qwen_rerank.evaluation.collection",
    "qwen_rerank.evaluation.experiment",
    "qwen_rerank.evaluation.explain",
    "qwen_rerank.evaluation.formats",
    "qwen_rerank.evaluation.measures",
    "qwen_rerank.evaluation.significance",
    "qwen_rerank.evaluation.stages",
    "qwen_rerank.evaluation.sweep",
)
_LINE = 120


def public_api() -> str:
    """Return every public module's names; what several modules export is told of in the first, what a base has there."""
    homes: dict[Any, str] = {}
    exported = {name: _code(import_module(name)) for name in MODULES}
    for module, code in exported.items():
        for name, value in code.items():
            homes.setdefault(value, f"{module}.{name}")
    text = []
    for module, code in exported.items():
        text.append(f"# {module}")
        for name, value in code.items():
            home = homes[value]
            text += described(name, value, homes) if home == f"{module}.{name}" else [f"{name} = {home}"]
        text.append("")
    return "\n".join(text)


def _code(module: ModuleType) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in exports(module)}
    return {name: value for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value)}


def exports(module: ModuleType) -> list[str]:
    """Return what a module exports: what it lists, else the classes and functions that it defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def described(name: str, value: Any, told: Mapping[Any, str]) -> list[str]:
    """Return the lines of a function or class; bases that are told of elsewhere are only named."""
    if inspect.isfunction(value):
        return signature(f"{_kind(value)} {name}", value)
    owners = [owner for owner in value.__mro__ if _is_ours(owner) and (owner is value or owner not in told)]
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    lines = [f"class {name}({bases})" if bases else f"class {name}"]
    makes = next((vars(owner)["__init__"] for owner in owners if "__init__" in vars(owner)), None)
    if makes is not None and not getattr(value, "_is_protocol", False):
        lines += signature("def __init__", makes)
    lines += members(owners, fields=not is_dataclass(value))
    return lines[:1] + [f"    {line}" for line in lines[1:]]


def members(owners: Sequence[type], *, fields: bool) -> Iterator[str]:
    """Yield the methods that classes define, and their fields where the constructor does not tell of them."""
    annotated = {name: text for owner in reversed(owners) for name, text in _annotations(owner).items() if fields}
    defined = {name: raw for owner in reversed(owners) for name, raw in vars(owner).items()}
    for name in sorted({*annotated, *defined}):
        raw = defined.get(name)
        if name.startswith("_") or name == "model_config":
            continue
        if isinstance(raw, property) and raw.fget:
            yield f"{name}: {_text(inspect.signature(raw.fget).return_annotation)}"
        elif isinstance(raw, classmethod | staticmethod):
            yield from signature(f"{type(raw).__name__} {name}", raw.__func__)
        elif inspect.isfunction(raw):
            yield from signature(f"{_kind(raw)} {name}", raw)
        elif name in annotated:
            yield f"{name}: {annotated[name]}"


def signature(start: str, function: Any) -> list[str]:
    """Return a signature as code, a parameter a line where one line is too long."""
    found = inspect.signature(function)
    parameters: list[str] = []
    kinds = {parameter.kind for parameter in found.parameters.values()}
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters and parameter.VAR_POSITIONAL not in kinds:
            parameters.append("*")
        parameters.append(_parameter(parameter))
    returns = found.return_annotation
    end = "" if returns is inspect.Signature.empty else f" -> {_text(returns)}"
    line = f"{start}({', '.join(parameters)}){end}"
    return [line] if len(line) < _LINE else [f"{start}(", *(f"    {one}," for one in parameters), f"){end}"]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    annotated = parameter.annotation is not parameter.empty
    text = f"{stars}{parameter.name}" + (f": {_text(parameter.annotation)}" if annotated else "")
    if parameter.default is parameter.empty:
        return text
    default = getattr(parameter.default, "__qualname__", None) or repr(parameter.default)
    return f"{text} = {default}" if annotated else f"{text}={default}"


def _kind(function: Any) -> str:
    return "async def" if inspect.iscoroutinefunction(function) else "def"


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("qwen_rerank")


def _annotations(owner: type) -> dict[str, str]:
    found = vars(owner).get("__annotations__", {})
    return {name: _text(value) for name, value in found.items() if "ClassVar" not in str(value)}


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


if __name__ == "__main__":
    FILE.write_text(public_api(), encoding="utf-8")
