"""Reads local files and hub data sets, as texts, rows or token ids.

Rows and texts are read when they are asked for, and they are not kept here. Only a `.json` is read whole. Token ids in
a `.npy` are memory-mapped. `datasets` and pyarrow take a second to import, so they are imported where they are used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lte.data.tables import table_rows
from lte.data.text_files import check_expansion, lines_of, open_text, read_text

Source = str | os.PathLike[str]
DataRow = dict[str, Any]

TEXT_EXTENSIONS = (".txt", ".jsonl", ".json", ".csv", ".tsv")  # each also as .gz
BINARY_EXTENSIONS = (".parquet", ".arrow", ".npy")
_KNOWN = f"{', '.join(TEXT_EXTENSIONS)} (each also .gz), {', '.join(BINARY_EXTENSIONS)}"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[^:/\\]*){0,2}")  # owner/name[:configuration[:split]]
_ROWS = 64  # of Arrow at once: a batch may hold a long text once that each of its rows repeats


def as_list(sources: Source | Sequence[Source]) -> list[Source]:
    """Return one source or several as a list. Raise ValueError if there is none."""
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not listed:
        raise ValueError("no data source given: name a file or a hub data set")
    return listed


def extension(source: Source) -> str | None:
    """Return the lower-case extension of a file without `.gz`, or None for a hub data set.

    Raise FileNotFoundError if there is no such file and the name has not the form of a hub id. Raise ValueError for a
    folder or an unknown extension.
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
            f"{name}: there is no such file, and it is no hub data set (owner/name or owner/name:configuration:split)"
        )
    return None


def read_token_ids(path: Source) -> np.ndarray:
    """Return the memory-mapped ids (tokens,) of a 1-D uint16 or uint32 `.npy`. Raise ValueError for another file."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is Python code, which numpy tokenises
        raise ValueError(f"{path}: empty, truncated or not a .npy array: {first_line(error)}") from error
    if not isinstance(ids, np.memmap) or ids.offset + ids.nbytes != Path(path).stat().st_size:
        raise ValueError(f"{path}: the file is not as long as its header says: save the array again")
    if ids.dtype not in (np.dtype(np.uint16), np.dtype(np.uint32)):
        raise ValueError(f"{path}: token ids are {ids.dtype}: save them as uint16 or uint32")
    if ids.ndim != 1:
        raise ValueError(f"{path}: token ids have shape {ids.shape}: save them 1-D, ids.reshape(-1)")
    if not len(ids):
        raise ValueError(f"{path}: the file is empty")
    return ids


def read_rows(source: Source, header: Sequence[str] = (), skip_bad_rows: bool = False) -> Iterator[DataRow]:
    """Give the rows of one source, each a dict from column to value. A `.txt` is one row with the column `text`.

    If a `.csv` or `.tsv` has no header line, `header` names the columns. A row of such a file with a wrong number of
    fields is an error. With `skip_bad_rows` it is skipped instead, and a warning says how many were.

    Raise ValueError or FileNotFoundError, in one line, if the source cannot be read. The first rows of a file are
    given before its last lines are read.
    """
    kind = extension(source)
    path = Path(source)
    if kind is None:
        rows = iter(hub_data(os.fspath(source)))
    elif kind == ".npy":
        raise ValueError(f"{source}: token ids have no columns: use them for language modelling only")
    elif kind in (".parquet", ".arrow"):
        rows = _arrow_rows(path, kind)
    elif kind == ".txt":
        rows = iter([{"text": read_text(path)}])
    elif kind == ".jsonl":
        rows = _jsonl_rows(path)
    elif kind == ".json":
        rows = iter(_json_rows(path))
    else:
        rows = table_rows(path, header, skip_bad_rows)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{source}: no rows")


def _jsonl_rows(path: Path) -> Iterator[DataRow]:
    blank = True
    with open_text(path, newline="\n") as file:  # JSON strings may hold U+2028, which ends lines elsewhere
        for number, line in enumerate(lines_of(file, path), 1):
            if not line.strip():
                continue
            blank = False
            row = _parsed(line.rstrip("\n"), path, number)
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: this is a {type(row).__name__}, but a JSON object is needed")
            yield row
    if blank:
        raise ValueError(f"{path}: the file is empty")


def _json_rows(path: Path) -> list[DataRow]:
    """Return all rows of a JSON file. JSON is one value, so the file is read whole: use `.jsonl` for many rows."""
    rows = _parsed(read_text(path), path)
    if isinstance(rows, dict):  # {"0": {...}, "1": {...}}
        rows = list(rows.values())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a list of JSON objects is needed")
    return rows


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Return one JSON value: the line `line` of a file, or the whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = ". If it is JSON lines, name it .jsonl" if line is None and error.msg == "Extra data" else ""
        where = f"{path}, line {line or error.lineno}"
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}){hint}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or deeply nested brackets
        where = path if line is None else f"{path}, line {line}"
        raise ValueError(f"{where}: JSON that cannot be read: {first_line(error)}") from error


def _arrow_rows(path: Path, kind: str) -> Iterator[DataRow]:
    import pyarrow
    import pyarrow.parquet

    unpacked = 0
    try:
        with pyarrow.OSFile(os.fspath(path)) as file:
            batches = (
                _arrow_batches(file) if kind == ".arrow" else pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS)
            )
            for batch in batches:
                unpacked += batch.nbytes
                check_expansion(path, unpacked)
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a readable {kind[1:]} file: {first_line(error)}") from error


def _arrow_batches(file: Any) -> Iterator[Any]:
    """Give the batches of an Arrow file: a stream, as `datasets` writes it, or a file with an index at its end."""
    from pyarrow import ArrowInvalid, ipc

    try:
        stream = ipc.open_stream(file)
    except ArrowInvalid:
        indexed = ipc.open_file(file)
        stream = (indexed.get_batch(i) for i in range(indexed.num_record_batches))
    for batch in stream:
        yield from (batch.slice(start, _ROWS) for start in range(0, len(batch), _ROWS))


def hub_data(source: str) -> Any:
    """Return a hub data set, as `datasets` gives it; raise ValueError if the hub does not give it."""
    import datasets

    name, configuration, split = [*source.split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the hub's errors have no common class, and the user needs only their first line
        raise ValueError(
            f"{source}: there is no such file, and the hub did not give it: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type."""
    return next(iter(str(error).splitlines()), type(error).__name__)
