"""Gradient checkpointing that a run cannot have: reentrant, whoever turned it on."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn


def check_recomputing(model: nn.Module) -> None:
    """Raise ValueError where the model recomputes blocks by re-entering autograd.

    Scores are recorded in the forward pass, which reentrant checkpointing runs without gradient: losses on them would
    move no router, and the last calibration would hide it.
    """
    name = next(_reentrant(model), None)
    if name is not None:
        raise ValueError(
            f"{name or 'the model'} has reentrant gradient checkpointing, which leaves routers without gradient: call "
            'model.gradient_checkpointing_enable({"use_reentrant": False}) instead'
        )


def _reentrant(model: nn.Module) -> Iterator[str]:
    """Names of modules that checkpoint so: transformers keeps the function on each that can."""
    for name, module in model.named_modules():
        checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False) or checkpoint is None:
            continue
        kwargs = checkpoint.keywords if isinstance(checkpoint, partial) else {}
        if kwargs.get("use_reentrant", True):  # torch's own default
            yield name
