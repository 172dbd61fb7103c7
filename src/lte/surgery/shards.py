"""Weight files of a model that are written one by one. An interrupted process goes on after the last of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lte.files import whole_file, write_whole
from lte.surgery.reading import read_json

INDEX = "model.safetensors.index.json"
UNFINISHED = ".lte-unfinished"
"""The folder, in the model's own, of the weight files until all are there."""
_JOURNAL = ".journal.json"


class Shards:
    """The weight files of a model, and a journal with the digest of each file that is complete.

    Args:
        folder: of the model.
        run: what the files are made from. Files of another run are not continued.
        count: the number of files.

    Raises:
        ValueError: the folder has unfinished files of another run.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], count: int) -> None:
        self.folder, self.place, self.count = folder, folder / UNFINISHED, count
        self._journal = self.place / _JOURNAL
        self._run, self._digests = json.loads(json.dumps(run)), {}
        if self._journal.is_file():
            before = read_json(self._journal)
            if before.get("run") != self._run:
                raise ValueError(
                    f"{folder} has the unfinished work of another command, model or version: repeat that command, or "
                    f"delete {self.place} to begin anew"
                )
            self._digests = before["digests"]

    def name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.count:05d}.safetensors"

    def has(self, number: int) -> bool:
        """Return whether this file is complete. Its content is compared with the journal."""
        path = self.place / self.name(number)
        return path.is_file() and self._digests.get(path.name) == _digest(path)

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a file, and then its digest into the journal.

        Raises:
            NotWritten: the disk is full, or the like.
        """
        path = self.place / self.name(number)
        with whole_file(path) as fresh:
            save_file(dict(tensors), fresh, metadata={"format": "pt"})
        self._digests[path.name] = _digest(path)
        write_whole(self._journal, json.dumps({"run": self._run, "digests": self._digests}) + "\n")

    def write_index(self, names: Mapping[str, int], metadata: Mapping[str, int]) -> None:
        """Write the index, from the name of each tensor to the number of its file."""
        index = {"metadata": metadata, "weight_map": {name: self.name(number) for name, number in names.items()}}
        write_whole(self.place / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def remove_journal(self) -> None:
        """Remove the journal, which was moved into the model's folder with the other files."""
        (self.folder / _JOURNAL).unlink(missing_ok=True)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
