"""What passes leave behind for who asked: lists on modules, each of one thread, since threads may share a model."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Kept = list[list[Any]]
"""Of a module: pairs of a thread, and the list of tensors that wants what its passes show. Lists, not callables: all
layers then look alike to ``torch.compile``; nor tuples, in which it takes lists for constants."""

_CHANGING = threading.Lock()


def of_this_thread(kept_in: Kept) -> list[list[Tensor]]:
    """The lists of this thread; all of them where a compiler looks on, which does not know threads."""
    if not kept_in or torch.compiler.is_compiling():
        return [kept for _, kept in kept_in]
    here = threading.get_ident()
    return [kept for thread, kept in kept_in if thread == here]


@contextmanager
def kept(wanted: Iterable[tuple[Any, list[Tensor]]]) -> Iterator[None]:
    """Within it, each module's ``kept_in`` holds the list given with it, for passes of this thread."""
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
