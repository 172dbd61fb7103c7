"""The kinds of values in a row of results. A row with a wrong value is an error, and is not drawn."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lte.evaluation.result_row import ResultRow

FieldKind = tuple[str, Callable[[Any], bool]]
"""The kind in words, and a function that says whether a value is of that kind."""


def _number(value: Any) -> bool:
    """Return whether the value is a number. NaN and infinity are numbers, because a run that diverged has them."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 10**300)


def _finite(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _method(value: Any) -> bool:
    options = value.values() if isinstance(value, dict) else ()
    plain = all(one is None or isinstance(one, str | int | float) for one in options)
    return plain and isinstance(value, dict) and isinstance(value.get("method"), str)


TEXT: FieldKind = ("a text", lambda value: isinstance(value, str))
WHOLE: FieldKind = ("a whole number", lambda value: _finite(value) and value == int(value))
QUALITY: FieldKind = ("a number", _number)
AMOUNT: FieldKind = ("a number of 0 or more", lambda value: _finite(value) and value >= 0)
POSITIVE: FieldKind = ("a number above 0", lambda value: _finite(value) and value > 0)
SHARE: FieldKind = ("a number from 0 to 1", lambda value: _number(value) and not (value < 0 or value > 1))  # or NaN
METHOD: FieldKind = (
    "a text, or an object whose field method is one, and whose options are single values",
    lambda value: isinstance(value, str) or _method(value),
)


def many(kind: FieldKind) -> FieldKind:
    return f"a list, each {kind[0]}", lambda value: isinstance(value, list) and all(map(kind[1], value))


def named(kind: FieldKind) -> FieldKind:
    """Return the kind of an object with any names, whose values are of one kind."""
    return f"an object, each value {kind[0]}", lambda one: isinstance(one, dict) and all(map(kind[1], one.values()))


def one_of(names: Collection[str]) -> FieldKind:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


OBJECT: FieldKind = ("an object", lambda value: isinstance(value, dict))


def check_fields(row: ResultRow, kinds: Mapping[str, FieldKind], where: str, needed: Iterable[str] = ()) -> None:
    """Raise ValueError unless each field of a row is of its kind. A field that is null counts as missing.

    The message names the place, the field and what is expected.
    """
    for name in needed:
        if row.get(name) is None:
            raise ValueError(f"{where}: the field {name} is missing; it has to be {kinds[name][0]}")
    for name, (words, fits) in kinds.items():
        value = row.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{where}: the field {name} is {_short(value)}, but it has to be {words}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
