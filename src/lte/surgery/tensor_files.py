"""Reads single tensors from the safetensors files of a folder.

``safe_open`` maps a whole file, privately. A limit on a process's memory counts such a map, and refuses it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES as DTYPES  # pyright: ignore[reportPrivateUsage]
from torch import Tensor

_MOST_HEADER = 100_000_000  # bytes, as safetensors itself allows


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Its bytes begin at ``start``."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return the tensor, on the CPU.

        Raises:
            ValueError: the file became shorter.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if not tensor.numel():
            return tensor
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            content: Any = tensor.view(-1).view(torch.uint8).numpy()
            left = memoryview(content)
            while left and (count := file.readinto(left)):
                left = left[count:]
        if left:
            raise ValueError(f"{self.path} is cut short: copy it again")
        return tensor

    def on_meta(self) -> Tensor:
        """Return a tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def stored_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return all tensors in safetensors files, by name.

    Raises:
        ValueError: a file is damaged or cut short.
    """
    return {name: tensor for path in paths for name, tensor in _tensors_in(path).items()}


def _tensors_in(path: Path) -> dict[str, StoredTensor]:
    try:
        return _checked_header(path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): copy it again") from error


def _checked_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a file (https://huggingface.co/docs/safetensors/index#format)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length))
    found, ends = {}, [0]
    for name, values in header.items():
        if name == "__metadata__":
            continue
        dtype, (begin, end) = DTYPES[values["dtype"]], values["data_offsets"]
        one = StoredTensor(path, 8 + length + begin, dtype, tuple(values["shape"]))
        if begin < 0 or min(one.shape, default=0) < 0 or end - begin != math.prod(one.shape) * dtype.itemsize:
            raise ValueError(f"{name} has another size than its shape")
        found[name] = one
        ends.append(end)
    if path.stat().st_size != 8 + length + max(ends):
        raise ValueError("its size is not that of its tensors")
    return found
