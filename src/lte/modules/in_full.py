"""A small module that trains in full beside frozen weights, for example a norm."""

import copy
from typing import Any

from torch import Tensor, nn


class InFull(nn.Module):
    """Runs a trained copy of a module in fp32. The output has the dtype of the input.

    Attributes:
        plain: the module itself, frozen.
        trained: its copy.
        off: whether ``plain`` runs.
    """

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.plain = plain.requires_grad_(False)
        self.trained = copy.deepcopy(plain).float().requires_grad_(True)
        self.off = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.off:
            return self.plain(x, *args, **kwargs)
        return self.trained(x.float(), *args, **kwargs).to(x.dtype)
