"""Filters compiled to SQL over the documents' metadata, so that they run before the search."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from qwen_rerank.checks import check_text
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.filters import AllOf, AnyOf, Condition, FieldTest, Moment, NotOf, Operand, parse_filter

Sql = tuple[str, list[Any]]  # an expression and the parameters for its question marks, in order

_SIGNS = {"$eq": "=", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
# A declared field's name stands inside a JSON path inside an SQL string: no quotes, backslashes or control characters.
_DECLARABLE = re.compile(r"""[^"'\\$\x00-\x1f\x7f][^"'\\\x00-\x1f\x7f]{0,99}""")
_INDEX = "CREATE INDEX field_{number} ON documents ({type}, {value})"
INDEX_PATTERN = re.compile(r"CREATE INDEX field_\d+ ON documents \(json_type\(.*\), json_extract\(.*\)\)", re.DOTALL)


def check_fields(fields: object) -> tuple[str, ...]:
    """Return the names of metadata fields to index, each once, in order.

    Raises:
        InvalidInputError: If one is no name that can be indexed.
    """
    if isinstance(fields, str) or not isinstance(fields, Iterable):
        raise InvalidInputError(f"indexed_fields must be a list of metadata keys such as ['lang'], not {fields!r}.")
    names = tuple(dict.fromkeys(check_text("indexed_fields", one) for one in fields))
    for name in names:
        if not _DECLARABLE.fullmatch(name):
            raise InvalidInputError(
                f"indexed_fields holds {name!r}; a name has 1 to 100 characters, no quotes and no backslash, and does "
                "not begin with $. Fields with other names can be filtered on without an index."
            )
    return names


def field_index(number: int, field: str) -> str:
    """Return the statement that makes the index of a declared field."""
    return _INDEX.format(number=number, type=_type_of(field), value=_value_of(field))


def compile_filter(filter: Mapping[str, Any], *, declared: Iterable[str] = ()) -> Sql:
    """Return an SQL condition on `documents` and its parameters.

    Args:
        filter: As `qwen_rerank.filters` describes it.
        declared: The fields that have an index.

    Raises:
        InvalidInputError: If it is no filter.
    """
    return _compile(parse_filter(filter), frozenset(declared))


def _compile(condition: Condition, declared: frozenset[str]) -> Sql:
    match condition:
        case AllOf(parts):
            return _joined(" AND ", "1", [_compile(part, declared) for part in parts])
        case AnyOf(parts):
            return _joined(" OR ", "0", [_compile(part, declared) for part in parts])
        case NotOf(part):
            sql, parameters = _compile(part, declared)
            # The type of a value that is not there is NULL, and NOT NULL is NULL; here it counts as false.
            return f"NOT ifnull({sql}, 0)", parameters
        case FieldTest(key, operator, operand) if key in declared:
            return _test(operator, operand, _type_of(key), _value_of(key))
        case FieldTest(key, operator, operand):
            sql, parameters = _test(operator, operand, "field.type", "field.value")
            # json_each takes the key as a value, so no key can change the statement or a JSON path.
            has = f"EXISTS (SELECT 1 FROM json_each(documents.metadata) AS field WHERE field.key = ? AND {sql})"
            return has, [key, *parameters]


def _joined(word: str, nothing: str, parts: list[Sql]) -> Sql:
    if len(parts) == 1:
        return parts[0]
    sql = word.join(part for part, _ in parts) or nothing
    return f"({sql})", [value for _, values in parts for value in values]


def _test(operator: str, operand: Any, type_: str, value: str) -> Sql:
    """Return the test of a value whose type and value are these SQL expressions."""
    if operator == "$exists":
        return f"({type_} IS NOT NULL)", []
    if operator == "$empty":
        return f"({type_} = 'array' AND {value} = '[]')", []
    if operator == "$in":
        return _among(operand, type_, value)
    if operator == "$contains":
        sql, parameters = _comparison("=", operand, "item.type", "item.value")
        items = f"json_each(CASE {type_} WHEN 'array' THEN {value} ELSE '[]' END)"
        return f"EXISTS (SELECT 1 FROM {items} AS item WHERE {sql})", parameters
    return _comparison(_SIGNS[operator], operand, type_, value)


def _comparison(sign: str, operand: Operand, type_: str, value: str) -> Sql:
    if operand is None or isinstance(operand, bool):
        return f"({type_} = '{json.dumps(operand)}')", []
    if isinstance(operand, str):
        return f"({type_} = 'text' AND {value} {sign} ?)", [operand]
    if isinstance(operand, Moment):
        return _moment(sign, operand.microseconds, type_, value)
    if isinstance(operand, float):
        # Read by the same function as the metadata, so that the same digits are the same number.
        return f"({type_} IN ('integer', 'real') AND {value} {sign} json_extract(?, '$'))", [json.dumps(operand)]
    return f"({type_} IN ('integer', 'real') AND {value} {sign} ?)", [operand]


def _moment(sign: str, microseconds: int, type_: str, value: str) -> Sql:
    # Text of a day nearby is enough to use an index; the exact moment is then read from the few that are left.
    near, days = [], []
    for bound, distance in ((">=", -2), ("<", 3)):
        if sign == "=" or sign[0] == bound[0]:
            try:
                day = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=distance, microseconds=microseconds)
            except OverflowError:
                continue
            near.append(f"{value} {bound} ? AND ")
            days.append(day.date().isoformat())
    return f"({type_} = 'text' AND {''.join(near)}moment({value}) {sign} ?)", [*days, microseconds]


def _among(operands: tuple[Operand, ...], type_: str, value: str) -> Sql:
    texts = [one for one in operands if isinstance(one, str)]
    numbers = [one for one in operands if isinstance(one, int | float) and not isinstance(one, bool)]
    others = [one for one in operands if one is None or isinstance(one, bool | Moment)]
    parts = [_comparison("=", one, type_, value) for one in others]
    for types, values in (("('text')", texts), ("('integer', 'real')", numbers)):
        if values:
            listed = f"({type_} IN {types} AND {value} IN (SELECT value FROM json_each(?)))"
            parts.append((listed, [json.dumps(values, ensure_ascii=False)]))
    return _joined(" OR ", "0", parts)


def _type_of(field: str) -> str:
    return f"json_type(metadata, '$.\"{field}\"')"


def _value_of(field: str) -> str:
    return f"json_extract(metadata, '$.\"{field}\"')"
