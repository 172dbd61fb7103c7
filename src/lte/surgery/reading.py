"""What libraries raise while they read a user's files, as one line that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lte.argument_error import Argument, ArgumentError

LONGEST = 300
"""Characters of another library's message that are passed on."""


@contextmanager
def reading(name: str, part: str = "") -> Iterator[None]:
    """Turn whatever a library raises within, while it reads the model ``name``, into one line.

    What ``lte`` itself raises is left as it is: its refusals are lines already, and its bugs keep their tracebacks.

    Raises:
        FileNotFoundError: ``name`` is no folder, and the hub has no such model or cannot be reached.
        ValueError: the files cannot be read.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers' Rust code
            raise
        line = " ".join(str(error).split())[:LONGEST]
        if _is_ours(error):
            if type(error) is ValueError and name not in line:
                raise ValueError(f"{name}: {error}") from error
            raise
        if "trust_remote_code" in str(error):
            raise ArgumentError(
                f"{name} brings code of its own, which was not run: read it; if you trust it, give ",
                Argument("trust_remote_code", "True"),
            ) from error
        here = Path(name).expanduser().exists()
        if not here and (isinstance(error, OSError) or type(error).__name__ == "HFValidationError"):
            raise FileNotFoundError(
                f"{name}: no such folder, and the hub has no such model or cannot be reached ({line})"
            ) from error
        if isinstance(error, OSError | ValueError) and line:
            raise ValueError(line if name in line else f"{name}: {part}{line}") from error
        raise ValueError(f"{name}: {part}cannot be read: {type(error).__name__}: {line}") from error


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by a line of ``lte``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "lte"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it holds something else, or cannot be read.
    """
    check_file(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, but a JSON object is needed: copy it again")
    return values


def check_file(path: Path) -> None:
    """Refuse what stands for a file, but is not it.

    Raises:
        ValueError: it is empty, a pointer of git-lfs, or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror}") from error
    if not start:
        raise ValueError(f"{path} is empty: copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of git-lfs, not the file: run git lfs pull")
