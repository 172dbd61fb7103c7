"""Thresholds on the inputs of linear layers, as TEAL sets them: an input that is not larger than the cut becomes 0.

A threshold is a hook and a buffer, not a class. Names, classes and weights of the layers stay the same. So LoRA,
quantisers and similar layers (GPT-2's ``Conv1D``) work as before.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lte.modules.tensor_parallel import check_not_shared
from lte.modules.token_masks import TokenMasks

CUT = "cut"


def add_cut_(linear: nn.Module) -> None:
    """Give a linear layer ``[..., I] -> [..., O]`` a buffer ``cut``, a scalar. It is 0, so no input changes."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    linear.register_buffer(CUT, weight.new_zeros(()))
    linear.register_forward_pre_hook(_drop_small)


def _drop_small(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x_TI, *rest = args
    return (x_TI.masked_fill(x_TI.abs() <= linear.get_buffer(CUT), 0), *rest)


class InputMeter:
    """Counts the inputs that are 0 in each layer, over forward passes.

    Attributes:
        weight: how often each token of the next passes counts: more than once if a pass stands for several.
    """

    def __init__(self) -> None:
        self.weight = 1
        self._zeros: dict[str, Tensor | int] = {}
        self._total: dict[str, Tensor | int] = {}

    def add(self, name: str, x_TI: Tensor, mask_T: Tensor | None) -> None:
        """Count a pass of one layer; Tokens with ``mask_T`` = 0 do not count."""
        zeros_T = x_TI.eq(0).sum(-1)
        real_T = torch.ones_like(zeros_T) if mask_T is None else mask_T.to(zeros_T.device).ne(0).long()
        self._zeros[name] = self._zeros.get(name, 0) + self.weight * (zeros_T * real_T).sum()
        self._total[name] = self._total.get(name, 0) + self.weight * real_T.sum() * x_TI.shape[-1]

    @property
    def by_linear(self) -> dict[str, float]:
        """The fraction of inputs that were 0, by the name of the layer. Empty before the first forward pass."""
        return {name: float(zeros / self._total[name]) for name, zeros in self._zeros.items()}


@contextmanager
def track_inputs(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[InputMeter]:
    """Count the inputs of ``linears`` that are 0, over all forward passes of ``model`` inside the context.

    Padding, which the attention mask says, does not count.

    Raises:
        ValueError: the model is divided by tensor parallelism, so a process sees only some of a layer's inputs.
    """
    check_not_shared(model, "counting inputs wants")
    meter, masks = InputMeter(), TokenMasks(model)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(masks.see, with_kwargs=True, prepend=True).remove)
        for name, linear in linears.items():

            def look(_linear: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                meter.add(name, args[0].detach(), masks.of(name, args[0].shape[:-1]))

            hooks.callback(linear.register_forward_pre_hook(look).remove)
        yield meter
