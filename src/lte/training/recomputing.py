"""Refuses reentrant gradient checkpointing, which a run cannot use."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn


def check_recomputing(model: nn.Module) -> None:
    """Raise ValueError if the model has reentrant gradient checkpointing.

    Its forward pass, in which scores are recorded, has no gradient. So losses on scores would not change any router,
    and the last calibration would hide this.
    """
    name = next(_reentrant(model), None)
    if name is not None:
        raise ValueError(
            f"{name or 'the model'} has reentrant gradient checkpointing, which leaves routers without gradient: call "
            'model.gradient_checkpointing_enable({"use_reentrant": False}) instead'
        )


def _reentrant(model: nn.Module) -> Iterator[str]:
    """Give the names of modules with reentrant checkpointing. transformers keeps its function on each module."""
    for name, module in model.named_modules():
        checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False) or checkpoint is None:
            continue
        kwargs = checkpoint.keywords if isinstance(checkpoint, partial) else {}
        if kwargs.get("use_reentrant", True):  # torch's own default
            yield name
