"""Fingerprints of content: 32 hexadecimal digits of every byte, by several threads."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np

from lte.data.mapped_ids import MappedIds

_CHUNK = 1 << 24  # bytes: a thread's share, and what it holds of a file


def digest_of_file(path: Path) -> str:
    """The fingerprint of a file."""

    def read(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(_CHUNK)

    return _digest(path.stat().st_size, read)


def digest_of_ids(ids: np.ndarray | MappedIds) -> str:
    """Return the fingerprint of the content of token ids, which may lie in files; not of their shape and type."""
    if isinstance(ids, np.ndarray):
        return digest_of_array(ids)
    size, count = ids.dtype.itemsize, len(ids)
    return _digest(count * size, lambda start: ids.read(start // size, (start + _CHUNK) // size).tobytes())


def digest_of_array(array: np.ndarray) -> str:
    """The fingerprint of an array's content, which may lie in a mapped file; not of its shape and type."""
    if array.size == 0:
        return digest([])
    content = memoryview(cast(Any, np.ascontiguousarray(array))).cast("B")
    return _digest(content.nbytes, lambda start: content[start : start + _CHUNK])


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """The fingerprint of bytes in this order, wherever they are cut."""
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _digest(size: int, read: Callable[[int], bytes | memoryview]) -> str:
    """Of the fingerprints of all chunks: hashing lets go of Python's lock, so threads share the work."""
    starts = range(0, size, _CHUNK)
    if len(starts) < 2:
        return digest([read(0)])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return digest(pool.map(lambda start: blake2b(read(start), digest_size=16).digest(), starts))
