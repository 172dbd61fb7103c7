"""The output of commands: tables and progress on stderr or a terminal, results and JSON on stdout."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Do nothing: :mod:`lte.cli.failures` handles it."""
        raise BrokenPipeError


_FIRST = os.environ.get("RANK", "0") == "0"  # the rank among processes that torchrun or accelerate started
out = _Console(highlight=False, width=None if sys.stdout.isatty() else 132, quiet=not _FIRST)
err = _Console(stderr=True, highlight=False)


def bar() -> Progress:
    """Return a progress bar on stderr. It is visible only on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal)


@contextmanager
def waiting(what: str, beside: Progress | None = None) -> Iterator[None]:
    """Show a bar without an end, and what is waited for. Where stderr is no terminal, one line says it.

    Args:
        what: in words.
        beside: the bars that are shown already.
    """
    if not err.is_terminal:
        err.print(what, markup=False)
    with nullcontext(beside) if beside is not None else bar() as progress:
        task = progress.add_task(what, total=None)
        yield
        progress.remove_task(task)


def track(items: Iterable[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar."""
    with bar() as progress:
        yield from progress.track(
            items, description=description, total=len(items) if isinstance(items, Sized) else None
        )


def table(title: str, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table; every column but the first is right-aligned."""
    made = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        made.add_column(name, justify="right" if index else "left")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    out.print(made)


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object as the last line of stdout. Of several processes only the first one prints."""
    if _FIRST:
        print(json.dumps(values), flush=True)
