"""The identity of a sweep's row: its parsed options, and its files by content."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lte.data.digest import digest, digest_of_file
from lte.training.arguments import LTETrainingArguments
from lte.training.identity import options_of

OPTIONS = "options"
_FILES = ("model", "text", "eval_text", "calibration_text", "data_folder", "include_path", "prompts")
"""Options that name files or folders. A hub id counts by its name alone."""
_ANYWHERE = ("output", "device", "json")
"""Options that do not change a row."""


def row_identity(*parsed: Any) -> dict[str, str]:
    """Return fingerprints of all options that change a result, and of each file or folder in options, by name.

    Args:
        parsed: the options of the command, and of each evaluation after it.
    """
    options = [dict(_options(one)) for one in parsed]
    found = {OPTIONS: digest([json.dumps(options, default=str, sort_keys=True).encode()])}
    for name in sorted({name for one in options for name in _named(one)}):
        if (path := Path(name).expanduser()).exists():
            found[name] = _digest_of_path(path)
    return found


def what_differs(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return what has changed since a row was made; None if nothing has."""
    files = [name for name in then if name in now and name != OPTIONS and then[name] != now[name]]
    if files:
        return f"{', '.join(files)} had another content"
    if then.get(OPTIONS) != now.get(OPTIONS):
        return "the command, its recipe, or this version of lte, had other options"
    return None


def _options(parsed: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(parsed, LTETrainingArguments):
        yield from options_of(parsed).items()
    elif is_dataclass(parsed):
        for one in fields(parsed):
            value = getattr(parsed, one.name)
            if is_dataclass(value):
                yield from ((f"{one.name}.{name}", inner) for name, inner in _options(value))
            elif one.name not in _ANYWHERE:
                yield one.name, value


def _named(options: Mapping[str, Any]) -> Iterator[str]:
    for option, value in options.items():
        if option.rpartition(".")[2] in _FILES and value:
            yield from [value] if isinstance(value, str) else value


def _digest_of_path(path: Path) -> str:
    if path.is_file():
        stat = path.stat()
        return _digest_of_file(path, stat.st_size, stat.st_mtime_ns)
    found = path.glob("*") if (path / "config.json").is_file() else path.rglob("*")  # a model, or a folder of data
    files = (one for one in sorted(found) if one.is_file() and not one.name.startswith("."))
    return digest(f"{one.relative_to(path)} {_digest_of_path(one)}\n".encode() for one in files)


@cache
def _digest_of_file(path: Path, _size: int, _changed: int) -> str:
    """Return the digest of a file. It is computed once for all runs of a sweep, unless the file changes."""
    return digest_of_file(path)
