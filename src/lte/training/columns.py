"""From rows to texts: one column as it is, or a template with several."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from lte.training.sources import Row, Source


def column(rows: Sequence[Row], name: str, source: Source) -> list[Any]:
    """One column of `rows`; ValueError with the columns there are when a row lacks it."""
    for number, row in enumerate(rows, 1):
        if name not in row:
            where = source if number == 1 else f"{source}: row {number}"
            header = " (the first line)" if re.search(r"\.[ct]sv(\.gz)?$", str(source), re.IGNORECASE) else ""
            raise ValueError(f"{where}: no column {name!r}, the columns{header} are {', '.join(map(repr, row))}")
    return [row[name] for row in rows]


def render(rows: Sequence[Row], template: str, source: Source) -> list[str]:
    """A text a row: the column named `template`, or, if it has braces, its {column} places filled in.

    A missing value (null) is an empty text. ValueError for an unknown column, a value that is no text or
    number, and a text with half a surrogate pair.
    """
    if "{" not in template and "}" not in template:
        return [_as_text(value, template, source) for value in column(rows, template, source)]
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error} (a brace meant as text is doubled)") from error
    pieces: list[list[str]] = []
    for literal, field, spec, conversion in parts:
        pieces.append([literal] * len(rows))
        if field is not None:  # format's own !r and :>8 have no use here, so they are part of the name
            name = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            pieces.append([_as_text(value, name, source) for value in column(rows, name, source)])
    return ["".join(piece) for piece in zip(*pieces, strict=True)]


def is_missing(value: Any) -> bool:
    """Null, or the NaN that pandas makes of it."""
    return value is None or value != value


def _as_text(value: Any, name: str, source: Source) -> str:
    if is_missing(value):
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"{source}: column {name!r} holds a {type(value).__name__}, a text is needed")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{source}: column {name!r} holds text that is not valid Unicode: {error}") from error
    return text
