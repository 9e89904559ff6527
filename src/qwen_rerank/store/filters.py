"""Metadata filters as SQL, so that they run before the search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwen_rerank.checks import check_text
from qwen_rerank.errors import InvalidInputError

# json_each takes the key as a value, so no key can change the statement or a JSON path.
_HAS = "EXISTS (SELECT 1 FROM json_each(documents.metadata) AS field WHERE field.key = ? AND {test})"


def compile_filter(filter: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return an SQL condition on `documents` and its parameters: every key must be there with an equal value.

    A number equals a number of the same value, `1` and `1.0` alike; a boolean equals only a boolean; None equals only
    a null that is there.

    Raises:
        InvalidInputError: If the filter is no mapping of strings to strings, numbers, booleans or None.
    """
    if not isinstance(filter, Mapping):
        raise InvalidInputError(f"filter must be a mapping like {{'lang': 'en'}}, not {type(filter).__name__}.")
    conditions, parameters = [], []
    for key, value in filter.items():
        test, values = _equality(key, value)
        conditions.append(_HAS.format(test=test))
        parameters += [check_text("filter key", key), *values]
    return " AND ".join(conditions) or "1", parameters


def _equality(key: str, value: object) -> tuple[str, list[Any]]:
    if value is None:
        return "field.type = 'null'", []
    if isinstance(value, bool):
        return f"field.type = '{'true' if value else 'false'}'", []
    if isinstance(value, str):
        return "field.type = 'text' AND field.value = ?", [check_text(f"filter[{key!r}]", value)]
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "field.type IN ('integer', 'real') AND field.value = ?", [value]
    if isinstance(value, float) and math.isfinite(value):
        return "field.type IN ('integer', 'real') AND field.value = ?", [value]
    raise InvalidInputError(
        f"filter[{key!r}] must be a string, a finite number of at most 64 bits, a boolean or None, not {value!r}."
    )
