"""Checks at the public doors: one clear sentence with the argument's name, its value and the way out."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TypeGuard

from qwen_rerank.errors import InvalidInputError, InvalidTextError


def check_text(name: str, value: object) -> str:
    """Return `value` if it is a string that UTF-8 can carry.

    Raises:
        InvalidTextError: If it is no string or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise InvalidTextError(f"{name} must be a string, not {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InvalidTextError(
            f"{name} holds a lone surrogate ({value[exc.start]!r} at character {exc.start}); repair the text, for "
            "example with text.encode('utf-8', 'replace').decode()."
        ) from exc
    return value


def check_query(value: object, *, name: str = "query", give: str = "the text to search for") -> str:
    """Return `value` if it is a text with something in it besides white space; `give` says what it should be."""
    text = check_text(name, value)
    if not text.strip():
        raise InvalidInputError(f"{name} is empty ({text!r}); give {give}.")
    return text


def check_texts(name: str, values: object) -> list[str]:
    """Return `values` as a list of strings; a single string is refused, because its characters are not documents."""
    texts, bad = sift_texts(name, values)
    if bad:
        raise bad[min(bad)]
    return texts


def sift_texts(name: str, values: object) -> tuple[list[str], dict[int, InvalidTextError]]:
    """Return `values` as a list of strings, with "" for each that is no text, and by place why it is none.

    Raises:
        InvalidInputError: If `values` is no list.
    """
    texts: list[str] = []
    bad: dict[int, InvalidTextError] = {}
    for i, value in enumerate(check_list(name, values, of="strings")):
        try:
            texts.append(check_text(f"{name}[{i}]", value))
        except InvalidTextError as exc:
            texts.append("")
            bad[i] = exc
    return texts, bad


def check_list(name: str, values: object, *, of: str) -> Sequence[object]:
    """Return `values` if it is a list or another sequence, and no string."""
    if isinstance(values, str | bytes):
        raise InvalidInputError(f"{name} must be a list of {of}, not {type(values).__name__}; wrap one text as [text].")
    if not isinstance(values, Sequence):
        raise InvalidInputError(f"{name} must be a list of {of}, not {type(values).__name__}; give list(…) of it.")
    return values


def kind_of(value: object) -> str:
    """Return the name of a value's class, with its module where it is no built-in one: there is more than one Document."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def shown_address(value: object) -> str:
    """Return an address as a message may show it: without user, password, query and fragment, where keys stand."""
    if not isinstance(value, str):
        return f"{type(value).__name__}"
    plain = re.split(r"[?#]", value, maxsplit=1)[0]
    return repr(re.sub(r"[^/]*@", "", plain)[:100])


def check_count(name: str, value: object, *, minimum: int = 1) -> int:
    """Return `value` if it is an integer of at least `minimum` (booleans are refused)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidInputError(f"{name} must be an integer of at least {minimum}, not {value!r}.")
    return value


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a number, and no boolean, that a float can hold: an integer may be too long for one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_probability(name: str, value: object) -> float:
    """Return `value` if it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidInputError(f"{name} must be a probability between 0 and 1, not {value!r}.")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """Return `value` if it is a finite number above 0."""
    if not is_finite(value) or value <= 0:
        raise InvalidInputError(f"{name} must be a finite number above 0, not {value!r}.")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidInputError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}.")
    return value


def check_weights(name: str, values: object, *, count: int) -> list[float]:
    """Return `values` if they are so many finite numbers, none below 0 and not all 0."""
    numbers = list(values) if isinstance(values, Sequence) and not isinstance(values, str | bytes) else []
    sound = all(is_finite(one) and one >= 0 for one in numbers)
    if len(numbers) != count or not sound or not any(numbers):
        raise InvalidInputError(f"{name} must be {count} numbers of at least 0, not all 0, not {values!r}.")
    return [float(one) for one in numbers]
