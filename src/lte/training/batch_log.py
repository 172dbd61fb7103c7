"""Batches of texts in a working file, one a line, so that a run that is killed goes on where it was."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lte.files import locked, sync, writing
from lte.training.row_identity import what_differs


@dataclass(frozen=True)
class Batch:
    """Texts that were written together.

    Attributes:
        rows: those that passed the filters, as rows of data: ``messages`` of a chat, or a ``text``.
        dropped: numbers of the others by reason.
        tokens: the number of tokens that were generated.
    """

    rows: list[dict[str, Any]]
    dropped: dict[str, int]
    tokens: int


class BatchLog:
    """The batches in a working file. :meth:`add` returns when a batch is on the disk."""

    def __init__(self, path: Path, batches: list[Batch]) -> None:
        self.batches, self.path = batches, path

    def add(self, batch: Batch) -> None:
        """Append a batch."""
        _append(self.path, vars(batch))
        self.batches.append(batch)


@contextmanager
def batch_log(path: Path, identity: Mapping[str, str]) -> Iterator[BatchLog]:
    """Open the working file ``path`` for this process alone. A last line that is not whole is removed.

    Args:
        identity: fingerprints of all that the batches depend on, see :func:`~lte.training.row_identity.row_identity`.

    Raises:
        ValueError: another process writes the file, or its batches were made in another way.
    """
    with writing(path):
        path.touch()
    with locked(path, wait=False) as held:
        if held is False:
            raise ValueError(f"{path}: another process writes it: wait for its end, or give another output")
        whole, _, torn = (written := path.read_bytes()).rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        if torn:
            with writing(path):
                os.truncate(path, len(written) - len(torn))
        if not first:
            _append(path, dict(identity))
        elif differs := what_differs(json.loads(first), identity):
            raise ValueError(f"{path} was begun in another way ({differs}): delete it, or give another output")
        yield BatchLog(path, [Batch(**json.loads(line)) for line in lines])


def _append(path: Path, line: dict[str, Any]) -> None:
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json_lines([line]))
    sync(path)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the rows as text, one on each line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
