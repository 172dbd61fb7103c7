"""Whole parameters of a model that FSDP2 divides among processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes share the parameters of a model."""
    return any(map(_is_part, model.parameters()))


@torch.no_grad()
def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather one parameter after the other on all processes. Return them on the CPU if ``keep`` is true, else nothing.

    All processes must call it together.
    """
    found: dict[str, Tensor] = {}
    tied: dict[int, Tensor] = {}
    for name, part in model.state_dict(keep_vars=True).items():
        if id(part) not in tied:
            full = cast(Any, part).full_tensor() if _is_part(part) else part
            full = full.wait() if hasattr(full, "wait") else full
            tied[id(part)] = full.detach().cpu() if keep else part
        if keep:
            found[name] = tied[id(part)]
    return found


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """Give modules whole parameters inside the context. At its end each process keeps its part of the first one's.

    All processes must enter it together. Inside, the modules must not run: FSDP2 would take their parts again. It does
    nothing to a module whose parameters are whole.

    https://docs.pytorch.org/docs/stable/distributed.tensor.html
    """
    parts = [
        (child, name, parameter)
        for module in modules
        for child in module.modules()
        for name, parameter in child.named_parameters(recurse=False)
        if _is_part(parameter)
    ]
    with torch.no_grad():
        for child, name, part in parts:
            full = cast(Any, part).full_tensor()
            setattr(child, name, nn.Parameter(full, requires_grad=part.requires_grad))
    changed = [getattr(child, name) for child, name, _ in parts]
    try:
        yield
    finally:
        for child, name, part in parts:
            setattr(child, name, part)
    if parts:
        from torch.distributed.tensor import distribute_tensor  # it takes half a second

        with torch.no_grad():
            for (_, _, part), full in zip(cast(Any, parts), changed, strict=True):
                part.to_local().copy_(distribute_tensor(full.data, part.device_mesh, part.placements).to_local())


def _is_part(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")
