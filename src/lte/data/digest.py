"""Fingerprints of content: 32 hexadecimal digits that depend on every byte, made by several threads."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np

from lte.data.mapped_ids import MappedIds

_CHUNK = 1 << 24  # bytes that a thread reads at once


def digest_of_file(path: Path) -> str:
    """The fingerprint of a file."""

    def read(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(_CHUNK)

    return _digest(path.stat().st_size, read)


def digest_of_ids(ids: np.ndarray | MappedIds) -> str:
    """Return the fingerprint of the values of token ids, which may be in files. Shape and type do not count."""
    if isinstance(ids, np.ndarray):
        return digest_of_array(ids)
    size, count = ids.dtype.itemsize, len(ids)
    return _digest(count * size, lambda start: ids.read(start // size, (start + _CHUNK) // size).tobytes())


def digest_of_array(array: np.ndarray) -> str:
    """Return the fingerprint of an array's values, which may be in a mapped file. Shape and type do not count."""
    if array.size == 0:
        return digest([])
    content = memoryview(cast(Any, np.ascontiguousarray(array))).cast("B")
    return _digest(content.nbytes, lambda start: content[start : start + _CHUNK])


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the fingerprint of bytes in this order. It does not depend on how the bytes are divided into parts."""
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _digest(size: int, read: Callable[[int], bytes | memoryview]) -> str:
    """Return the fingerprint of the fingerprints of all chunks. Threads make them: hashing releases Python's lock."""
    starts = range(0, size, _CHUNK)
    if len(starts) < 2:
        return digest([read(0)])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return digest(pool.map(lambda start: blake2b(read(start), digest_size=16).digest(), starts))
