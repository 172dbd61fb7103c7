"""A fingerprint of the content of a dataset."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from lte.data.batches import PackedBlocks, PaddedRows
from lte.data.digest import digest, digest_of_ids

_SAMPLED = 64  # rows of a dataset that is not ours


def content_of(dataset: Any) -> Any:
    """Return the number of rows and a fingerprint of their content, by name. Return None if there is no dataset.

    Every value of our own datasets counts. Of other datasets with a length, up to 64 rows, evenly spaced, are read
    twice. If a row differs the second time, as augmented rows do, the content is None. A stream is not read at all.
    """
    if isinstance(dataset, Mapping):
        return {name: content_of(one) for name, one in dataset.items()}
    if isinstance(dataset, PackedBlocks):
        content = digest([digest_of_ids(dataset.ids).encode(), _sampled(dataset).encode()])  # ids, and rows of them
        shape = {"sequence_length": dataset.sequence_length, "bos": [*dataset.bos]}
        return {"rows": len(dataset), **shape, "content": content}
    if isinstance(dataset, PaddedRows):
        names = [*(dataset.class_names or ())]
        return {"rows": len(dataset), "class_names": names, "content": digest(_parts_of(dataset))}
    if dataset is None or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return None
    with _random_states_kept():
        first, second = _sampled(dataset), _sampled(dataset)
    return {"rows": len(dataset), "content": first if first == second else None}


def _parts_of(dataset: PaddedRows) -> Iterator[bytes]:
    for name, values in dataset.columns.items():
        yield name.encode()
        for value in values:
            yield f" {value.dtype} {value.shape} ".encode()
            yield value.tobytes()


def _sampled(dataset: Any) -> str:
    rows, found = len(dataset), blake2b(digest_size=16)
    for index in sorted({round(i * (rows - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)} if rows else ()):
        for part in _parts_of_value(dataset[index]):
            found.update(part)
    return found.hexdigest()


def _parts_of_value(value: Any) -> Iterator[bytes]:
    """The bytes of a value: numbers, texts, arrays, and containers of these. Any other value gives only its type."""
    yield type(value).__name__.encode()
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        yield f" {value.dtype} {value.shape} ".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield str(name).encode()
            yield from _parts_of_value(one)
    elif isinstance(value, str | bytes | int | float | None):
        yield repr(value).encode()
    elif isinstance(value, Sequence):
        for one in value:
            yield from _parts_of_value(one)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    before, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002  # the state that datasets draw from
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)  # noqa: NPY002
