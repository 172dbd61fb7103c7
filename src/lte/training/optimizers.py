"""Optimizers of other packages, chosen by ``optim``: which are refused, how they restart, how their states are read."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_PROJECTORS = {
    "galore": ("galore_torch.galore_projector.GaLoreProjector",),
    "apollo": ("apollo_torch.random_projector.GradientProjector", "apollo_torch.svd_projector.GaLoreProjector"),
}
"""Classes in the states of an optimizer, besides tensors and numbers."""


def check_optimizer(optim: str) -> None:
    """Raise ValueError if an optimizer steps during the backward pass: it has no group of routers."""
    if optim.endswith("layerwise") or "lomo" in optim:
        other = "adamw_torch_8bit" if "lomo" in optim else optim.removesuffix("_layerwise")
        raise ValueError(
            f"optim={optim!r} steps during the backward pass and knows one learning rate, so routers would not learn: "
            f"give {other}"
        )


def slow_down_(optimizer: torch.optim.Optimizer, fast: Iterable[Tensor], factor: float) -> None:
    """Multiply the learning rate of all parameters except the ``fast`` ones. They get groups of their own."""
    ids = {id(one) for one in fast}
    for group in [*optimizer.param_groups]:
        slow = [one for one in group["params"] if id(one) not in ids]
        group["params"] = [one for one in group["params"] if id(one) in ids]
        if slow:
            optimizer.add_param_group({**group, "params": slow, "lr": factor * group["lr"]})


def reading_states(optim: str) -> AbstractContextManager[Any]:
    """Return a context in which ``torch.load`` reads the states of this optimizer."""
    paths = (path.rpartition(".") for path in _PROJECTORS.get(optim.partition("_")[0], ()))
    return torch.serialization.safe_globals([getattr(import_module(module), name) for module, _, name in paths])


def first_state(optimizer: torch.optim.Optimizer) -> dict[Any, dict[str, Any]]:
    """Return a copy of the state before the first step. APOLLO has seeds there, most optimizers nothing."""
    return {parameter: dict(state) for parameter, state in optimizer.state.items()}


def restart_(optimizer: Any, state: dict[Any, dict[str, Any]]) -> None:
    """Give an optimizer a state of :func:`first_state` again."""
    optimizer.state.clear()
    optimizer.state.update({parameter: dict(one) for parameter, one in state.items()})
