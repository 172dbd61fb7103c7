"""Thresholds on the inputs of linear layers, as TEAL sets them: an input that is not larger than the cut becomes 0.

A threshold is a hook and a buffer, not a class. Names, classes and weights of the layers stay the same. So LoRA,
quantisers and similar layers (GPT-2's ``Conv1D``) work as before.
"""

from typing import Any

from torch import Tensor, nn

from lte.modules.kept import Kept, of_this_thread

CUT = "cut"
_CUTTING = "cutting"


def add_cut_(linear: nn.Module, cutting: bool = True) -> None:
    """Give a linear layer ``[..., I] -> [..., O]`` a buffer ``cut``, a scalar. It is 0, so no input changes.

    Args:
        cutting: whether the layer applies its threshold, until :func:`switch_cuts_` changes this.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    linear.register_buffer(CUT, weight.new_zeros(()))
    vars(linear).update({_CUTTING: cutting, "kept_in": []})
    linear.register_forward_pre_hook(_drop_small)


def cut_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers with a threshold on their inputs, by name."""
    return {name: module for name, module in model.named_modules() if _CUTTING in vars(module)}


def switch_cuts_(model: nn.Module, cutting: bool) -> None:
    """Say for all layers with a threshold whether they apply it. A layer that does not is dense."""
    for linear in cut_layers(model).values():
        vars(linear)[_CUTTING] = cutting


class LeavesOut(nn.Module):
    """Base of a linear layer that compares its inputs with the threshold itself in some passes."""

    kept_in: Kept

    def skips(self, x_TI: Tensor) -> bool:
        """Return whether it does so with this input. Then its hook changes nothing."""
        raise NotImplementedError


def _drop_small(linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    x_TI, *rest = args
    if not linear.cutting or (isinstance(linear, LeavesOut) and linear.skips(x_TI)):
        return None
    x_TI = x_TI.masked_fill(x_TI.abs() <= linear.get_buffer(CUT), 0)
    for zeros in of_this_thread(linear.kept_in):
        zeros.append(x_TI.detach().eq(0).sum(-1))
    return (x_TI, *rest)
