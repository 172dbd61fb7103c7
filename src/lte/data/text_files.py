"""Opening text files, plain or gzipped: what is read is bounded, and what is wrong has its place."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TextIO

Path = str | os.PathLike[str]

LONGEST = 1 << 26
"""Characters of a line or a field: one beyond it is no row, but a file with a quote left open or without line ends."""
_READ = 1 << 18  # characters at once
_EXPANSION = 100  # text packs to a tenth; what gzip packs to a thousandth has nothing in it
_SMALL = 1 << 26  # bytes: a file that unpacks to less may expand as it likes


@contextmanager
def open_text(path: Path, newline: str = "") -> Iterator[TextIO]:
    """A UTF-8 file to read from, unpacked when named `.gz`, every line end as it is, without a BOM.

    Args:
        newline: what ends a line, as for `open`.

    While it is read, raise ValueError for a broken gzip file, one that unpacks to far more than text does, and bytes
    that are not UTF-8, with their place.
    """
    try:
        with _open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 at {_not_utf8(path)}: save the file as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not a gzip file ({error}): copy it again") from error


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a file, piece by piece; ValueError for one with nothing but white space."""
    blank = True
    with open_text(path) as file:
        while piece := file.read(_READ):
            blank = blank and piece.isspace()
            yield piece
    if blank:
        raise ValueError(f"{path}: the file is empty")


def read_text(path: Path) -> str:
    """The whole text of a file; ValueError as for its pieces."""
    return "".join(read_pieces(path))


def lines_of(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file; ValueError for one above `LONGEST`."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), ""), 1):
        if len(line) > LONGEST:
            raise ValueError(f"{path}, line {number}: above {LONGEST} characters: is it text with a row a line?")
        yield line


def check_expansion(path: Path, unpacked: int) -> None:
    """ValueError where a packed file has given so many bytes that it cannot be text."""
    if unpacked > max(_SMALL, _EXPANSION * os.path.getsize(path)):
        raise ValueError(
            f"{path}: it unpacks to over {_EXPANSION} times its size, as no text does: if it is meant, unpack it and "
            "name the plain file"
        )


class _Unpacking(io.RawIOBase):
    """The bytes of a gzip file, as long as they are not too many."""

    def __init__(self, path: Path):
        self._path, self._unpacked = path, 0
        self._file = gzip.open(path, "rb")  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._file.read(len(buffer))
        self._unpacked += len(data)
        check_expansion(self._path, self._unpacked)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bytes(path: Path) -> io.BufferedReader:
    if os.fspath(path).lower().endswith(".gz"):
        return io.BufferedReader(_Unpacking(path), _READ)
    return open(path, "rb")


def _not_utf8(path: Path) -> str:
    """The place of the first byte that is not UTF-8."""
    offset = 0
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"byte {offset + error.start} (line {number})"
            offset += len(line)
    raise AssertionError("all of it is UTF-8")
