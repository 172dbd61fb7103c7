"""Opens text files, plain or gzipped. Lengths are limited, and errors name the place in the file."""

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
"""Characters of a line or a field. A longer one is no row: a quote is not closed, or the file has no line ends."""
_READ = 1 << 18  # characters at once
_EXPANSION = 100  # gzip packs text to a tenth; a file that it packs to a thousandth holds no text
_SMALL = 1 << 26  # bytes: a file that unpacks to less is not checked


@contextmanager
def open_text(path: Path, newline: str = "") -> Iterator[TextIO]:
    """Open a UTF-8 file for reading, without its BOM. A `.gz` is unpacked. Line ends stay as they are.

    Args:
        newline: the end of a line, as for `open`.

    Reading raises ValueError for a broken gzip file, for one that unpacks to far more than text does, and for bytes
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
    """Give the text of a file in pieces. Raise ValueError if it holds only white space."""
    blank = True
    with open_text(path) as file:
        while piece := file.read(_READ):
            blank = blank and piece.isspace()
            yield piece
    if blank:
        raise ValueError(f"{path}: the file is empty")


def read_text(path: Path) -> str:
    """Return the whole text of a file. It raises the errors of :func:`read_pieces`."""
    return "".join(read_pieces(path))


def lines_of(file: TextIO, path: Path) -> Iterator[str]:
    """Give the lines of an open file. Raise ValueError for a line above `LONGEST`."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), ""), 1):
        if len(line) > LONGEST:
            raise ValueError(f"{path}, line {number}: above {LONGEST} characters: give text with one row in each line")
        yield line


def check_expansion(path: Path, unpacked: int) -> None:
    """Raise ValueError if a packed file has given more bytes than text can have."""
    if unpacked > max(_SMALL, _EXPANSION * os.path.getsize(path)):
        raise ValueError(
            f"{path}: it unpacks to over {_EXPANSION} times its size, and no text does: if this is meant, unpack it "
            "and name the plain file"
        )


class _Unpacking(io.RawIOBase):
    """The bytes of a gzip file. Reading raises ValueError if there are too many."""

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
    """Return the place of the first byte that is not UTF-8."""
    offset = 0
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"byte {offset + error.start} (line {number})"
            offset += len(line)
    raise AssertionError("all of it is UTF-8")
