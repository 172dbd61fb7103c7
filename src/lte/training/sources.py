"""Reading what a user points at: local files and hub data sets, as texts, rows or token ids.

Everything is read whole, which makes each error exact (a byte, a line, a row); text too large for memory
is better tokenised once into a `.npy`, which is memory-mapped. Only parquet and the hub need more than
the standard library and numpy, and import it when they are used.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str]
Row = dict[str, Any]

TEXT_EXTENSIONS = (".txt", ".jsonl", ".json", ".csv", ".tsv")  # each also as .gz
BINARY_EXTENSIONS = (".parquet", ".npy")
_KNOWN = f"{', '.join(TEXT_EXTENSIONS)} (each also .gz), {', '.join(BINARY_EXTENSIONS)}"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[^:/\\]*){0,2}")  # owner/name[:configuration[:split]]
_MISSING = 'needs the {} package: pip install "lte[data]"'


def as_list(sources: Source | Sequence[Source]) -> list[Source]:
    """One source or several, as a list; none at all is an error."""
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not listed:
        raise ValueError("no data source given: name a file or a hub data set")
    return listed


def extension(source: Source) -> str | None:
    """The lower-case extension of a file without `.gz`, or None for a hub data set.

    Raises FileNotFoundError when there is neither such a file nor the form of a hub id, ValueError for a
    folder or an extension that is not known.
    """
    path, name = Path(source), os.fspath(source)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    known = suffix in (TEXT_EXTENSIONS if path.name.lower().endswith(".gz") else TEXT_EXTENSIONS + BINARY_EXTENSIONS)
    if path.is_dir():
        raise ValueError(f"{name} is a folder: name the files in it")
    if path.is_file():
        if known:
            return suffix
        raise ValueError(f"{name}: unknown extension {''.join(path.suffixes[-2:])!r}, use one of {_KNOWN}")
    if known or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such file, nor is it a hub data set (owner/name or owner/name:configuration:split)"
        )
    return None


def read_text(path: Source) -> str:
    """The whole of a UTF-8 file, gunzipped when named `.gz`, every newline as it is, without a BOM.

    Raises ValueError for a broken gzip file, bytes that are not UTF-8 (with their place) and a file with
    nothing but white space.
    """
    data = Path(path).read_bytes()
    if os.fspath(path).lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: truncated or not a gzip file ({error}): copy it again") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: not UTF-8 at byte {error.start} (line {line}): save the file as UTF-8") from error
    if data.startswith(codecs.BOM_UTF8):
        text = text[1:]
    if not text or text.isspace():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_token_ids(path: Source) -> np.ndarray:
    """The memory-mapped ids (tokens,) of a 1-D uint16 or uint32 `.npy` file; ValueError for any other."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: empty, truncated or not a .npy array: {_first_line(error)}") from error
    if ids.dtype not in (np.dtype(np.uint16), np.dtype(np.uint32)):
        raise ValueError(f"{path}: token ids are {ids.dtype}: save them as uint16 or uint32")
    if ids.ndim != 1:
        raise ValueError(f"{path}: token ids have shape {ids.shape}: save them 1-D, ids.reshape(-1)")
    if not len(ids):
        raise ValueError(f"{path}: the file is empty")
    return ids


def read_rows(source: Source, header: Sequence[str] = (), skip_bad_rows: bool = False) -> list[Row]:
    """The rows of one source, each a dict from column to value; a `.txt` is one row with the column `text`.

    Of a `.csv` or `.tsv` that has no header line, `header` names the columns. Rows of these with a wrong number of
    fields are an error, or with `skip_bad_rows` left out, counted and warned of.

    Raises ValueError (or FileNotFoundError, ImportError) in one line when the source cannot be read.
    """
    kind = extension(source)
    if kind is None:
        rows = _hub_rows(os.fspath(source))
    elif kind == ".npy":
        raise ValueError(f"{source}: token ids have no columns, they serve language modelling only")
    elif kind == ".parquet":
        rows = _parquet_rows(source)
    else:
        text = read_text(source)
        if kind == ".txt":
            return [{"text": text}]
        json_rows = {".jsonl": _jsonl_rows, ".json": _json_rows}.get(kind)
        rows = json_rows(text, source) if json_rows else _table_rows(text, source, header, skip_bad_rows)
    if not rows:
        raise ValueError(f"{source}: no rows")
    return rows


def _jsonl_rows(text: str, path: Source) -> list[Row]:
    rows = []
    # Not splitlines(): it also breaks at U+2028, which JSON leaves unescaped in strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__}, a JSON object is needed")
        rows.append(row)
    return rows


def _json_rows(text: str, path: Source) -> list[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ", or is it JSON lines, named .jsonl?" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}){hint}") from error
    if isinstance(rows, dict):  # {"0": {...}, "1": {...}}
        rows = list(rows.values())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a list of JSON objects is needed")
    return rows


def _table_rows(text: str, path: Source, names: Sequence[str], skip_bad_rows: bool) -> list[Row]:
    tabs = Path(path).name.lower().removesuffix(".gz").endswith(".tsv")
    # A tab-separated file has no quoting: its quotes are text and need not balance.
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    limit = csv.field_size_limit(2**31 - 1)  # whole articles are longer than the default of 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        header = list(names) or next(reader)
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: the header names a column twice: {', '.join(map(repr, header))}")
        rows, bad = [], 0
        for fields in reader:
            if fields and len(fields) != len(header):
                bad += 1
                if skip_bad_rows:
                    continue
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but the header has {len(header)}"
                )
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if bad:
        logger.warning("%s: skipped %d of %d rows with a wrong number of fields", path, bad, bad + len(rows))
    return rows


def _parquet_rows(path: Source) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} {_MISSING.format('pyarrow')}") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file: {_first_line(error)}") from error


def _hub_rows(source: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source}: no such file, and a hub data set {_MISSING.format('datasets')}") from error
    name, configuration, split = [*source.split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train").to_list()
    except Exception as error:  # the hub's errors share no class, and the user needs their line only
        raise ValueError(f"{source}: no such file, and the hub has not given it: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
