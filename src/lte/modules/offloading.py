"""Offloading by accelerate (``device_map``): weights that are not in memory are on the meta device."""

from torch import nn


def check_in_memory(model: nn.Module) -> None:
    """Raise ValueError unless all weights of the model are in memory."""
    name = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if name is not None:
        raise ValueError(f"{name} is on the meta device: load the model's weights first, without offloading")
