"""Sparsity and cost of forward passes of any model. Its conversion says how they are measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.modules.input_threshold import CUT, cut_layers
from lte.modules.sparse_ffn import Selecting
from lte.surgery.complete import check_numbers
from lte.surgery.conversion import Conversion, conversion_of
from lte.surgery.cost import Spent


def check_finite(model: PreTrainedModel, logits: Tensor) -> None:
    """Raise ValueError unless all outputs of ``model`` are finite."""
    if not logits.isfinite().all():
        raise ValueError(
            f"outputs of the model {model.name_or_path} are NaN or infinite: the model is damaged, or its dtype cannot "
            "hold them"
        )


@contextmanager
def measure(model: PreTrainedModel, entry: nn.Module | None = None) -> Iterator[Any]:
    """Measure all forward passes of ``model`` inside the context. :func:`spent` gives their cost.

    Padding, which the attention mask says, does not count.

    Args:
        entry: the part of ``model`` that is called, e.g. its backbone; None for the model.

    Raises:
        ValueError: a router's weight or a threshold is NaN or infinite. It would count as idle.
    """
    entry = model if entry is None else entry
    check_numbers("the model", _choosing(entry))
    with _conversion(model).meter(model, entry) as meter:
        yield meter


def spent(model: PreTrainedModel, meter: Any) -> Spent:
    """Return the cost of the passes that ``meter`` measured."""
    return _conversion(model).spent(model, meter)


def _conversion(model: PreTrainedModel) -> Conversion:
    return conversion_of(model.config) or Conversion()


def _choosing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors that decide what is idle: those of routers and compensations, and thresholds on inputs."""
    for name, module in model.named_modules():
        if isinstance(module, Selecting):
            parts = {"router": module.router, "compensation": module.compensation}
            for part, one in parts.items():
                yield from ((f"{name}.{part}.{key}", value) for key, value in (one or nn.Module()).state_dict().items())
    yield from ((f"{name}.{CUT}", linear.get_buffer(CUT)) for name, linear in cut_layers(model).items())
