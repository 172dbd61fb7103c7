"""Makes a text of a row: one column as it is, or a template with several columns."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any

from lte.data.sources import DataRow, Source
from lte.data.tokenise import as_unicode


def cell(row: DataRow, name: str, source: Source, number: int) -> Any:
    """Return one column of row `number` (from 1). Raise ValueError, with the names of columns, if it is missing."""
    if name not in row:
        where = source if number == 1 else f"{source}: row {number}"
        header = " (the first line)" if re.search(r"\.[ct]sv(\.gz)?$", str(source), re.IGNORECASE) else ""
        raise ValueError(f"{where}: no column {name!r}, the columns{header} are {', '.join(map(repr, row))}")
    return row[name]


def text_of(template: str, source: Source) -> Callable[[DataRow, int], str]:
    """Return a function from a row and its number to a text: the column `template`, or a template's filled {places}.

    A missing value (null) is an empty text. Raise ValueError if the template is not valid. The function raises
    ValueError for an unknown column, a value that is no text or number, and a text with half a surrogate pair.
    """
    if "{" not in template and "}" not in template:
        return lambda row, number: _as_text(row, template, source, number)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error} (write a brace that is text twice)") from error
    pieces: list[tuple[str, str | None]] = []
    for (
        literal,
        field,
        spec,
        conversion,
    ) in parts:  # !r and :>8 of str.format are not used here: they are a part of the name
        name = None
        if field is not None:
            name = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        pieces.append((literal, name))

    def filled(row: DataRow, number: int) -> str:
        return "".join(
            literal if name is None else literal + _as_text(row, name, source, number) for literal, name in pieces
        )

    return filled


def is_missing(value: Any) -> bool:
    """Null, or the NaN that pandas makes of it."""
    return value is None or value != value


def _as_text(row: DataRow, name: str, source: Source, number: int) -> str:
    value = cell(row, name, source, number)
    if is_missing(value):
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"{source}: row {number}: column {name!r} holds a {type(value).__name__}, but a text is needed"
        )
    try:
        return as_unicode(str(value))
    except ValueError as error:
        raise ValueError(f"{source}: row {number}: column {name!r}: {error}") from error
