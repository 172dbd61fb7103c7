"""The router: one linear map and a sigmoid, from an FFN's input to a score for every expert."""

import math

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """``scores = sigmoid(temperature * (x W^T + bias))``, in fp32 whatever the input or autocast.

    The paper's router is the case bias 0, temperature 1 (LTE paper, section 4.1). The bias lets
    training start with every expert open and moves the threshold afterwards; the temperature
    sharpens scores during the soft stage and is folded into the weights when that stage ends.

    It is not an ``nn.Linear``, so that tools which rewrite linear layers (LoRA, quantisers) leave it be.

    Shapes: weight ``[E, D]``, bias ``[E]``, input ``[..., D]``, scores ``[..., E]``.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    temperature: Tensor

    def __init__(self, d_model: int, num_experts: int, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device))
        self.register_buffer("temperature", torch.ones((), device=device))

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @torch.no_grad()
    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Draw the weight uniformly within ``1 / sqrt(D)``, as ``nn.Linear`` does; set bias, temperature 1.

        The draw is made on the CPU, so that it is the same on every device.
        """
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator))
        self.bias.fill_(bias)
        self.temperature.fill_(1.0)

    @torch.no_grad()
    def fold_temperature(self) -> None:
        """Put the temperature into weight and bias; the scores stay the same."""
        self.weight.mul_(self.temperature)
        self.bias.mul_(self.temperature)
        self.temperature.fill_(1.0)

    def logits(self, x_TD: Tensor) -> Tensor:
        device_type = "cpu" if x_TD.is_meta else x_TD.device.type  # meta has no autocast to turn off
        with torch.autocast(device_type, enabled=False):
            logits_TE = nn.functional.linear(x_TD.float(), self.weight.float(), self.bias.float())
            return logits_TE * self.temperature.float()

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.logits(x_TD).sigmoid()

    def extra_repr(self) -> str:
        return f"d_model={self.weight.shape[1]}, num_experts={self.num_experts}"
