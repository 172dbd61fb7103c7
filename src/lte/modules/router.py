"""Routers: they give a score to every expert. LTE's router is one linear map and a sigmoid on an FFN's input."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lte.core.linear import linear_fp32

Reads = Literal["input", "activation", "neurons"]


class BaseRouter(nn.Module):
    """The interface of a router: it gives scores ``[..., E]`` in [0, 1], or booleans if it only chooses.

    Attributes:
        reads: its argument. ``input`` is the FFN's input ``[..., D]``. ``activation`` ``[..., F]`` is that of the gate
            in a gated FFN. ``neurons`` ``[..., F]`` are the inputs of the down projection. All values that a router
            reads are computed for all neurons, and their cost is counted.
        is_lte: whether it is LTE's :class:`Router`, which calibration and kernels are made for.
        scales: whether mode hard scales an expert by its score too, as in a mixture of experts.
    """

    reads: ClassVar[Reads] = "input"
    is_lte: ClassVar[bool] = False
    scales: ClassVar[bool] = False

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    @property
    def num_weights(self) -> int:
        """The weights that a token multiplies: those of its matrices."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)

    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Initialise the router. ``bias`` is the start of its bias, if it has one."""


@torch.no_grad()
def draw_(weight_ED: Tensor, generator: torch.Generator | None = None) -> None:
    """Draw a weight uniformly within ``1 / sqrt(D)``, as ``nn.Linear`` does, on the CPU: the same on every device."""
    bound = 1 / math.sqrt(weight_ED.shape[1])
    weight_ED.copy_(torch.empty(weight_ED.shape).uniform_(-bound, bound, generator=generator))


class Router(BaseRouter):
    """``scores = sigmoid(temperature * (x W^T + bias))``, in fp32, also under autocast.

    The paper's router has bias 0 and temperature 1 (LTE paper, section 4.1). With a bias, training can start
    with every expert open, and the bias moves the threshold afterwards. The temperature moves scores to 0 and 1
    in the soft stage. When that stage ends, it is multiplied into the weights.

    It is not an ``nn.Linear``, so that tools that rewrite linear layers (LoRA, quantisers) do not change it.

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
        """Draw the weight, set the bias, and set the temperature to 1."""
        draw_(self.weight, generator)
        self.bias.fill_(bias)
        self.temperature.fill_(1.0)

    @torch.no_grad()
    def fold_temperature(self) -> None:
        """Multiply weight and bias by the temperature and set it to 1. The scores stay the same."""
        self.weight.mul_(self.temperature)
        self.bias.mul_(self.temperature)
        self.temperature.fill_(1.0)

    def logits(self, x_TD: Tensor, experts: slice | None = None) -> Tensor:
        """Return the arguments of the sigmoid ``[..., E]``, for all experts or for some."""
        weight, bias = (self.weight, self.bias) if experts is None else (self.weight[experts], self.bias[experts])
        return linear_fp32(x_TD, weight, bias) * self.temperature.float()

    def forward(self, x_TD: Tensor, experts: slice | None = None) -> Tensor:
        return self.logits(x_TD, experts).sigmoid()

    def extra_repr(self) -> str:
        return f"d_model={self.weight.shape[1]}, num_experts={self.num_experts}"
