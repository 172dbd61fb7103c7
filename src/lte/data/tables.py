"""Reads rows of .csv and .tsv files, and decides whether quotes in a .tsv are text or mark fields."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lte.data.text_files import LONGEST, lines_of, open_text

logger = logging.getLogger(__name__)

_QUOTED: dict[str, Any] = {"strict": True}
_LITERAL: dict[str, Any] = {"quoting": csv.QUOTE_NONE}
_IN_QUOTES = re.compile(r'"(?:[^"]|"")*"')


def table_rows(path: Path, names: Sequence[str], skip_bad_rows: bool) -> Iterator[dict[str, str]]:
    """Give the rows of a table. Its columns are `names`, or the fields of its first line.

    A .csv has quoted fields. Quotes in a .tsv are text, unless a CSV writer made the file (:func:`_writes_quotes`).
    With `skip_bad_rows`, rows with a wrong number of fields are skipped and counted.

    Raise ValueError, with the line, for such a row otherwise, and for a line that cannot be parsed.
    """
    if path.name.lower().removesuffix(".gz").endswith(".tsv"):
        dialect = {"delimiter": "\t", **(_QUOTED if _writes_quotes(path, len(names)) else _LITERAL)}
    else:
        dialect = _QUOTED
    rows = bad = 0
    header = list(names)
    for line, fields in _fields(path, dialect):
        if not header:
            header = fields
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: the header names a column twice: {', '.join(map(repr, header))}")
            if not any(name.strip() for name in header):
                raise ValueError(f"{path}: the file is empty, or its first line is empty")
            continue
        rows += 1
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
            continue
        if not skip_bad_rows:
            raise ValueError(f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}")
        bad += 1
    if bad:
        logger.warning("%s: skipped %d of %d rows with a wrong number of fields", path, bad, rows)


def _fields(path: Path, dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """Give the line number and the fields of each row that is not empty."""
    with open_text(path) as file:
        reader = csv.reader(lines_of(file, path), **dialect)
        while True:
            limit = csv.field_size_limit(LONGEST)  # whole articles are longer than the default of 128 KiB
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            finally:
                csv.field_size_limit(limit)
            if fields is None:
                return
            if fields:
                yield reader.line_num, fields


def _writes_quotes(path: Path, width: int) -> bool:
    """Return whether quotes of a tab-separated file mark fields, as a CSV writer puts them. Otherwise they are text.

    A quoted field may hold a tab or a line end. If quotes are read as text, such a line has a wrong number of fields.
    If they are read as marks, the number is right, so they are marks. If the file has no such line, every field that
    begins with a quote must be complete. In addition, a quote inside a field must be doubled, or all fields except
    numbers must have quotes.
    """
    wrong, expected = 0, width
    begins = text = doubled = False
    everywhere = True
    for _, cells in _fields(path, {"delimiter": "\t", **_LITERAL}):
        expected = expected or len(cells)
        wrong += len(cells) != expected
        for cell in cells:
            if cell.startswith('"'):
                begins = True
                text = text or not _IN_QUOTES.fullmatch(cell)
                doubled = doubled or '""' in cell[1:-1]
            elif everywhere:
                everywhere = _is_number(cell)
    if not begins:
        return False
    written = not text and (doubled or everywhere)
    if not wrong:
        return written
    still_wrong, expected = 0, width
    try:
        for _, cells in _fields(path, {"delimiter": "\t", **_QUOTED}):
            expected = expected or len(cells)
            still_wrong += len(cells) != expected
    except ValueError:  # a quote that ends in the middle of a field, or does not end
        return False
    return still_wrong < wrong or (still_wrong == wrong and written)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return not cell
    return True
