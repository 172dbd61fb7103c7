"""Token ids on disk: one stream in Arrow files. Only the parts that are read are in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

ROW = 1 << 16
"""Ids in each row of the files; the last row has fewer."""
COLUMN = "ids"
_RENEWED = 512  # reads


class MappedIds:
    """Token ids (tokens,) uint16 or uint32 in Arrow files. A slice is a view, and `np.asarray` reads it.

    Args:
        files: each has rows of `ROW` ids in the column `ids`. The very last row may be shorter.
    """

    def __init__(self, files: Sequence[str]):
        self._mapping = _Mapping(files)
        self._start, self._stop = 0, self._mapping.count
        self.dtype = self._mapping.dtype

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> MappedIds:
        start, stop, step = part.indices(len(self))
        assert step == 1, "a view has all ids of its part"
        view = copy.copy(self)
        view._start, view._stop = self._start + start, self._start + max(start, stop)
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        ids = self._mapping.read(self._start, self._stop)
        return ids.astype(dtype or self.dtype, copy=bool(copy))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids of a part that is read once. The mapped pages of the files are released afterwards."""
        start, stop, _ = slice(start, stop).indices(len(self))
        return self._mapping.read_once(self._start + start, self._start + stop)


class _Mapping:
    """The files of some ids, mapped into memory. Pages that were read stay there, so the map is renewed at times."""

    def __init__(self, files: Sequence[str]):
        self.files = tuple(files)
        self._ends = np.cumsum(
            [opened([file]).num_rows for file in self.files]
        )  # rows of the files before this file, and of this file
        self._table, self._reads = opened(self.files), 0
        column = self._table[COLUMN]
        self.dtype = np.dtype(column.type.value_type.to_pandas_dtype())
        self.count = (len(column) - 1) * ROW + len(column[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        self._reads += 1
        if self._reads % _RENEWED == 0:
            self._table = opened(self.files)
        return _read(self._table, start, stop)

    def read_once(self, start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(self._ends, [start // ROW, (stop - 1) // ROW], side="right")
        before = int(self._ends[first - 1]) * ROW if first else 0
        return _read(opened(self.files[first : last + 1]), start - before, stop - before).copy()

    def __reduce__(self) -> Any:
        return _Mapping, (self.files,)


def rows_of(stream: Iterable[np.ndarray], dtype: Any) -> Iterator[dict[str, np.ndarray]]:
    """Give the rows that hold a stream of ids, at least one."""
    row, used, given = np.empty(ROW, dtype), 0, False
    for ids in stream:
        while len(ids):
            taken = ids[: ROW - used]
            row[used : used + len(taken)] = taken
            used, ids = used + len(taken), ids[len(taken) :]
            if used == ROW:
                yield {COLUMN: row}
                row, used, given = np.empty(ROW, dtype), 0, True
    if used or not given:
        yield {COLUMN: row[:used]}


def opened(files: Sequence[str]) -> Any:
    """Return the table of Arrow files, each mapped into memory."""
    from datasets.table import MemoryMappedTable, concat_tables

    return concat_tables([MemoryMappedTable.from_file(file) for file in files])


def _read(table: Any, start: int, stop: int) -> np.ndarray:
    """The ids from `start` to `stop`. They are a view of the mapped file if they are in one piece there."""
    first, end = start // ROW, -(-stop // ROW)
    column = table.fast_slice(first, end - first)[COLUMN] if start < stop else table[COLUMN].slice(0, 0)
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    ids = (
        parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, column.type.value_type.to_pandas_dtype()), *parts])
    )
    return ids[start - first * ROW : stop - first * ROW]
