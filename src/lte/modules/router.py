"""Routers: a score for every expert. LTE's is one linear map and a sigmoid, on an FFN's input."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lte.core.linear import linear_fp32

Reads = Literal["input", "activation", "neurons"]


class BaseRouter(nn.Module):
    """What every router is to a sparse FFN: scores ``[..., E]`` in [0, 1], booleans where it only chooses.

    Attributes:
        reads: what it is given: the FFN's ``input`` ``[..., D]``; its ``activation`` ``[..., F]``, the gate's in a
            gated FFN; or the ``neurons`` ``[..., F]``, as the down projection takes them. What it reads is computed
            for all neurons, and charged so.
        is_lte: whether it is LTE's :class:`Router`, which calibration and kernels are made for.
        scales: whether what it keeps is scaled by its score in mode hard too, as a mixture of experts does.
    """

    reads: ClassVar[Reads] = "input"
    is_lte: ClassVar[bool] = False
    scales: ClassVar[bool] = False

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    @property
    def num_weights(self) -> int:
        """What a token costs it: the weights of its matrices."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)

    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Initialise it, before it is trained or fitted, or weights are loaded. ``bias``: where it has one."""


@torch.no_grad()
def draw_(weight_ED: Tensor, generator: torch.Generator | None = None) -> None:
    """Draw a weight uniformly within ``1 / sqrt(D)``, as ``nn.Linear`` does; on the CPU, so alike on every device."""
    bound = 1 / math.sqrt(weight_ED.shape[1])
    weight_ED.copy_(torch.empty(weight_ED.shape).uniform_(-bound, bound, generator=generator))


class Router(BaseRouter):
    """``scores = sigmoid(temperature * (x W^T + bias))``, in fp32 whatever the input or autocast.

    The paper's router is the case bias 0, temperature 1 (LTE paper, section 4.1). The bias lets
    training start with every expert open and moves the threshold afterwards; the temperature
    sharpens scores during the soft stage and is folded into the weights when that stage ends.

    It is not an ``nn.Linear``, so that tools which rewrite linear layers (LoRA, quantisers) leave it be.

    Shapes: weight ``[E, D]``, bias ``[E]``, input ``[..., D]``, scores ``[..., E]``.
    """

    is_lte: ClassVar[bool] = True
    weight: nn.Parameter
    bias: nn.Parameter
    temperature: Tensor

    def __init__(self, d_model: int, num_experts: int, device: torch.device | None = None):
        super().__init__(num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device))
        self.register_buffer("temperature", torch.ones((), device=device))

    @torch.no_grad()
    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Draw the weight, set bias, temperature 1."""
        draw_(self.weight, generator)
        self.bias.fill_(bias)
        self.temperature.fill_(1.0)

    @torch.no_grad()
    def fold_temperature(self) -> None:
        """Put the temperature into weight and bias; the scores stay the same."""
        self.weight.mul_(self.temperature)
        self.bias.mul_(self.temperature)
        self.temperature.fill_(1.0)

    def logits(self, x_TD: Tensor, experts: slice | None = None) -> Tensor:
        """What the sigmoid is taken of, for all experts or for some."""
        weight, bias = (self.weight, self.bias) if experts is None else (self.weight[experts], self.bias[experts])
        return linear_fp32(x_TD, weight, bias) * self.temperature.float()

    def forward(self, x_TD: Tensor, experts: slice | None = None) -> Tensor:
        return self.logits(x_TD, experts).sigmoid()

    def extra_repr(self) -> str:
        return f"d_model={self.weight.shape[1]}, num_experts={self.num_experts}"
