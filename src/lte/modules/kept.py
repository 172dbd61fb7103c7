"""Lists on modules that forward passes append to. A list belongs to one thread: threads may share a model."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Kept = list[list[Any]]
"""The lists of a module: pairs of a thread and a list for the tensors of its passes. With callables, layers would
differ for ``torch.compile``. In tuples, ``torch.compile`` takes lists for constants."""

_CHANGING = threading.Lock()


def of_this_thread(kept_in: Kept) -> list[list[Tensor]]:
    """Return the lists of this thread. While a program is compiled, return all lists: a compiler knows no threads."""
    if not kept_in or torch.compiler.is_compiling():
        return [kept for _, kept in kept_in]
    here = threading.get_ident()
    return [kept for thread, kept in kept_in if thread == here]


@contextmanager
def kept(wanted: Iterable[tuple[Any, list[Tensor]]]) -> Iterator[None]:
    """Put each list into ``kept_in`` of its module inside the context, for passes of this thread."""
    here, wanted = threading.get_ident(), list(wanted)
    with _CHANGING:
        for module, one in wanted:
            module.kept_in = [*module.kept_in, [here, one]]
    try:
        yield
    finally:
        with _CHANGING:
            for module, one in wanted:
                module.kept_in = [entry for entry in module.kept_in if entry[1] is not one]
