"""Token ids on disk: one stream in Arrow files, of which only what is asked for is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

ROW = 1 << 16
"""Ids in each row of the files; the last row has fewer."""
COLUMN = "ids"


class MappedIds:
    """Token ids (tokens,) uint16 or uint32 in Arrow files. A slice is a view of them, `np.asarray` reads it.

    Args:
        files: each with rows of `ROW` ids in the column `ids`, but for the last row of all.
        start, stop: the part that this one is of all ids.
    """

    def __init__(self, files: Sequence[str], start: int = 0, stop: int | None = None):
        self._files = tuple(files)
        self._table = opened(self._files)
        self._ends = np.cumsum([opened([file]).num_rows for file in self._files])  # rows of the files before and of it
        column = self._table[COLUMN]
        self.dtype = np.dtype(column.type.value_type.to_pandas_dtype())
        if stop is None:
            stop = (len(column) - 1) * ROW + len(column[-1])
        self._start, self._stop = start, max(start, stop)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> MappedIds:
        start, stop, step = part.indices(len(self))
        assert step == 1, "a view has all ids of its part"
        view = object.__new__(MappedIds)
        view.__dict__.update(self.__dict__, _start=self._start + start, _stop=self._start + max(start, stop))
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        ids = _read(self._table, self._start, self._stop)
        return ids.astype(dtype or self.dtype, copy=bool(copy))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids of a part that is read once: pages of the files that it maps are let go of."""
        start, stop = (self._start + place for place in slice(start, stop).indices(len(self))[:2])
        first, last = np.searchsorted(self._ends, [start // ROW, (stop - 1) // ROW], side="right")
        before = int(self._ends[first - 1]) * ROW if first else 0
        return _read(opened(self._files[first : last + 1]), start - before, stop - before).copy()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._files, self._start, self._stop

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)


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
    """The ids from `start` to `stop`; a view of the mapped file where they are in one piece there."""
    first, end = start // ROW, -(-stop // ROW)
    column = table.fast_slice(first, end - first)[COLUMN] if start < stop else table[COLUMN].slice(0, 0)
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    ids = (
        parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, column.type.value_type.to_pandas_dtype()), *parts])
    )
    return ids[start - first * ROW : stop - first * ROW]
