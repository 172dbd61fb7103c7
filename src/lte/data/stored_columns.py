"""Columns of rows on disk: each value is read from Arrow files when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

from lte.data.mapped_ids import opened
from lte.data.stored import keep_rows

_AT_ONCE = 1000  # rows


class StoredColumn(Sequence[Any]):
    """One column of Arrow files, with its rows in any order: arrays (L,) int32, numbers or texts."""

    def __init__(self, files: Sequence[str], name: str, order: np.ndarray | None = None):
        self._files, self._name, self._table = tuple(files), name, opened(files)
        self._order = np.arange(len(self._table[name])) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> StoredColumn: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._values(int(self._order[index]), 1)[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _AT_ONCE):
            places = self._order[start : start + _AT_ONCE].tolist()
            first, last = min(places), max(places)
            if last - first < 4 * _AT_ONCE:
                values = self._values(first, last - first + 1)
                yield from (values[place - first] for place in places)
            else:
                yield from (self._values(place, 1)[0] for place in places)

    def select(self, indices: Iterable[int]) -> StoredColumn:
        """Return the column of the rows at `indices`, in that order."""
        return StoredColumn(self._files, self._name, self._order[np.fromiter(indices, np.int64)])

    def _values(self, start: int, count: int) -> list[Any]:
        values = list[Any]()
        for chunk in self._table.fast_slice(start, count)[self._name].chunks:
            if hasattr(chunk, "offsets"):
                ids = chunk.values.to_numpy()
                values += [ids[begin:end] for begin, end in pairwise(chunk.offsets.to_pylist())]
            else:
                values += chunk.to_pylist()
        return values

    def __getstate__(self) -> tuple[Any, ...]:
        return self._files, self._name, self._order

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)


def columns_of(make: Callable[[], Iterable[dict[str, Any]]], key: str | None) -> dict[str, Sequence[Any]]:
    """Return the columns of the rows that `make` gives. They are on disk under this key, or in memory without a key.

    Raises:
        NotWritten, ValueError: as :func:`~lte.data.stored.keep_rows`.
    """
    if key is not None:
        files = keep_rows(make, key, _AT_ONCE)
        return {name: StoredColumn(files, name) for name in opened(files).column_names}
    columns: dict[str, list[Any]] = {}
    for row in make():
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return dict(columns)
