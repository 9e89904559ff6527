"""The filter language: which documents may be found, by their metadata, as plain dicts such as `{"year": {"$gte": 2020}}`.

A filter is a mapping; all its entries must hold. An entry is one of

- `key: value`                   the value is there and equal,
- `key: {operator: operand, …}`  every operator holds for the value,
- `"$and": [filter, …]`, `"$or": [filter, …]`, `"$not": filter`.

`$eq` equal · `$ne` not equal · `$gt $gte $lt $lte` greater, less · `$in $nin` one of a list, none of it · `$exists` the
key is there or not · `$contains` a list that holds the value · `$not` the operators inside do not all hold.

Values compare by kind: numbers with numbers (`1` equals `1.0`), text with text (by code points), booleans with booleans
(`True` is not `1`), None with a null that is there, `[]` with an empty list. A `date` or `datetime` compares, as a moment, with text in ISO 8601
such as "2024-05-01" or "2024-05-01T12:00:00+08:00"; without an offset it is UTC. `$ne`, `$nin` and `$not` are the exact
opposites, so they also hold where the key is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from qwen_rerank.checks import check_text
from qwen_rerank.errors import InvalidInputError

OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$contains", "$not")
COMBINERS = ("$and", "$or", "$not")
_OPPOSITES = {"$ne": "$eq", "$nin": "$in"}
# What SQLite's parser and its expressions hold in every version.
_MAX_DEPTH = 8
_MAX_PARTS = 300
_MAX_TESTS = 700  # of a whole filter: each may be a level of depth in the statement, of which SQLite reads 1000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ISO_8601 = re.compile(
    r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)?)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time, in microseconds since 1970-01-01 UTC."""

    microseconds: int


Operand = str | int | float | bool | Moment | None


@dataclass(frozen=True, slots=True)
class FieldTest:
    """A test of one metadata value.

    Attributes:
        key: Name of the value.
        operator: "$eq", "$gt", "$gte", "$lt", "$lte", "$in", "$exists", "$contains", or "$empty" for a list.
        operand: What it is compared with; a tuple for "$in", None for "$exists" and "$empty".
    """

    key: str
    operator: str
    operand: Operand | tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class AllOf:
    """Holds when every part holds."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Holds when at least one part holds."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class NotOf:
    """Holds when its part does not."""

    part: Condition


Condition = FieldTest | AllOf | AnyOf | NotOf


def parse_filter(filter: object, *, name: str = "filter") -> Condition:
    """Return a filter as a tree of conditions.

    Raises:
        InvalidInputError: If it is no mapping, or has an operator or an operand that there is not; says what there is.
    """
    condition = _parse(filter, name=name, depth=0)
    if (count := count_tests(condition)) > _MAX_TESTS:
        raise InvalidInputError(
            f"{name} has {count} tests in all, more than {_MAX_TESTS}; one {{key: {{'$in': [...]}}}} may do."
        )
    return condition


def count_tests(condition: Condition) -> int:
    """Return how many values a condition tests; 0 where it says nothing of any document."""
    match condition:
        case AllOf(parts) | AnyOf(parts):
            return sum(map(count_tests, parts))
        case NotOf(part):
            return count_tests(part)
        case FieldTest():
            return 1


def _parse(filter: object, *, name: str, depth: int) -> Condition:
    if not isinstance(filter, Mapping):
        raise InvalidInputError(f"{name} must be a mapping like {{'lang': 'en'}}, not {type(filter).__name__}.")
    if depth > _MAX_DEPTH:
        raise InvalidInputError(f"filter is nested more than {_MAX_DEPTH} deep; write it flatter.")
    if len(filter) > _MAX_PARTS:
        raise _too_many(name, len(filter))
    return AllOf(tuple(_entry(name, check_text(f"{name} key", key), value, depth) for key, value in filter.items()))


def _entry(name: str, key: str, value: object, depth: int) -> Condition:
    if key == "$not":
        return NotOf(_parse(value, name=f"{name}['$not']", depth=depth + 1))
    if key in ("$and", "$or"):
        if not isinstance(value, list | tuple) or not value:
            raise InvalidInputError(f"{name}[{key!r}] must be a list of at least one filter, not {value!r}.")
        if len(value) > _MAX_PARTS:
            raise _too_many(f"{name}[{key!r}]", len(value))
        named = (f"{name}[{key!r}][{i}]" for i in range(len(value)))
        parts = tuple(_parse(part, name=one, depth=depth + 1) for part, one in zip(value, named, strict=True))
        return AllOf(parts) if key == "$and" else AnyOf(parts)
    if key.startswith("$"):
        raise _unknown(name, key, COMBINERS)
    return _tests(f"{name}[{key!r}]", key, value if isinstance(value, Mapping) else {"$eq": value}, depth)


def _tests(name: str, key: str, operators: Mapping[Any, object], depth: int) -> Condition:
    if not operators or depth > _MAX_DEPTH:
        raise InvalidInputError(f"{name} must have one operator of {', '.join(OPERATORS)}, and few in one another.")
    return AllOf(tuple(_test(name, key, operator, operand, depth) for operator, operand in operators.items()))


def _test(name: str, key: str, operator: object, operand: object, depth: int) -> Condition:
    if operator not in OPERATORS:
        raise _unknown(name, operator, OPERATORS)
    if operator in _OPPOSITES:
        return NotOf(_test(name, key, _OPPOSITES[operator], operand, depth))
    where = f"{name}[{operator!r}]"
    if operator == "$not":
        if not isinstance(operand, Mapping):
            raise InvalidInputError(f"{where} must be a mapping like {{'$gt': 3}}, not {operand!r}.")
        return NotOf(_tests(where, key, operand, depth + 1))
    if operator == "$exists":
        if not isinstance(operand, bool):
            raise InvalidInputError(f"{where} must be True or False, not {operand!r}.")
        test = FieldTest(key, "$exists", None)
        return test if operand else NotOf(test)
    if operator == "$eq" and isinstance(operand, list) and not operand:
        return FieldTest(key, "$empty", None)
    if operator == "$in":
        if not isinstance(operand, list | tuple | set | frozenset):
            raise InvalidInputError(f"{where} must be a list of values, not {operand!r}.")
        return FieldTest(key, "$in", tuple(_operand(f"{where}[{i}]", one) for i, one in enumerate(operand)))
    checked = _operand(where, operand)
    if operator in _ORDERS and (checked is None or isinstance(checked, bool)):
        raise InvalidInputError(f"{where} must be a number, a text or a date, not {operand!r}; others have no order.")
    return FieldTest(key, str(operator), checked)


def _operand(name: str, value: object) -> Operand:
    if isinstance(value, datetime | date):
        return Moment(_microseconds(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(name, value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise InvalidInputError(
        f"{name} must be a string, a finite number of at most 64 bits, a boolean, a date or None, not {value!r}; "
        f"the operators are {', '.join(OPERATORS)}."
    )


def _too_many(name: str, count: int) -> InvalidInputError:
    return InvalidInputError(f"{name} has {count} parts, more than {_MAX_PARTS}; one {{key: {{'$in': [...]}}}} may do.")


def _unknown(name: str, operator: object, known: tuple[str, ...]) -> InvalidInputError:
    return InvalidInputError(f"{name} has the operator {operator!r}, which there is not; there are {', '.join(known)}.")


# Evaluation


def matches(condition: Condition, metadata: Mapping[str, Any]) -> bool:
    """Return whether a document's metadata meets a condition."""
    match condition:
        case AllOf(parts):
            return all(matches(part, metadata) for part in parts)
        case AnyOf(parts):
            return any(matches(part, metadata) for part in parts)
        case NotOf(part):
            return not matches(part, metadata)
        case FieldTest(key, operator, operand):
            return key in metadata and _holds(operator, metadata[key], operand)


def _holds(operator: str, value: Any, operand: Any) -> bool:
    if operator == "$exists":
        return True
    if operator == "$in":
        return any(_holds("$eq", value, one) for one in operand)
    if operator == "$empty":
        return isinstance(value, list) and not value
    if operator == "$contains":
        return isinstance(value, list) and any(_holds("$eq", one, operand) for one in value)
    if isinstance(operand, Moment):
        value, operand = moment(value), operand.microseconds
    return _kind(value) == _kind(operand) != "other" and _ORDERS.get(operator, _equal)(_plain(value), _plain(operand))


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b)


_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": lambda a, b: a > b,
    "$gte": lambda a, b: a >= b,
    "$lt": lambda a, b: a < b,
    "$lte": lambda a, b: a <= b,
}


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return "number" if isinstance(value, int | float) else "text" if isinstance(value, str) else "other"


def _plain(value: Any) -> Any:
    # A database reads a longer integer as a float, so here it is one too.
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value) if abs(value) < 2**1023 else math.copysign(math.inf, value)
    return value


def moment(value: object) -> int | None:
    """Return the moment of an ISO 8601 text in microseconds since 1970 UTC, or None where it is none."""
    if not isinstance(value, str) or not _ISO_8601.fullmatch(value):
        return None
    try:
        return _microseconds(datetime.fromisoformat(value))
    except ValueError:  # such as the 30th of February
        return None


def _microseconds(value: date) -> int:
    whole = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    passed = (whole if whole.tzinfo else whole.replace(tzinfo=UTC)) - _EPOCH
    return (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds
