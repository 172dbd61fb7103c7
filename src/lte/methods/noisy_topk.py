"""Noisy top-k gating: noise on the logits in training (Shazeer et al., ICLR 2017, arXiv 1701.06538)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lte.core.linear import linear_fp32
from lte.methods.mixture import Mixture, check_weight, softmax_of
from lte.methods.topk_moe import check_weight_sum
from lte.modules.mixture import MixtureRouter
from lte.surgery.sites import FFNSite


@dataclass(frozen=True)
class NoisyTopKConfig(Mixture):
    """How to convert a model for noisy top-k gating.

    Attributes:
        expert_size: neurons of an expert; must divide d_ff.
        seed: of grouping and router initialisation.
        target_sparsity: fraction of idle neurons, for every token in every layer.
        grouping: ``kmeans`` on the rows of the first FFN weight, ``coactivation`` from data, or ``random``.
        weight_sum: the sum of a token's weights. None is k, so that their mean is 1 (paper: 1).
        importance_weight: of the loss on unequal sums of weights (paper: 0.1).
        load_weight: of the loss on unequal numbers of tokens (paper: 0.1).

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "noisy-topk"

    weight_sum: float | None = None
    importance_weight: float = 0.1
    load_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("importance_weight", self.importance_weight)
        check_weight("load_weight", self.load_weight)
        check_weight_sum(self.weight_sum)

    def build_router(self, site: FFNSite, device: torch.device) -> "NoisyRouter":
        return NoisyRouter(self, *self.router_shape(site), device)


class NoisyRouter(MixtureRouter):
    """In training, logits get noise of deviation ``softplus(x noise^T)``. Shapes: noise ``[E, D]``, unused in use."""

    def __init__(
        self, method: NoisyTopKConfig, d_model: int, num_experts: int, k: int, device: torch.device | None = None
    ):
        super().__init__(d_model, num_experts, k, device)
        self.method = method
        self.noise = nn.Parameter(torch.empty(num_experts, d_model, device=device))

    @torch.no_grad()
    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Set both matrices to 0, so that only noise chooses at first (paper)."""
        self.weight.zero_()
        self.noise.zero_()
        self.bias.fill_(bias)

    def explore(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        return logits_TE + torch.randn_like(logits_TE) * self.deviation(x_TD)

    def deviation(self, x_TD: Tensor) -> Tensor:
        return softplus(linear_fp32(x_TD, self.noise))

    def weigh(self, logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        return softmax_of(logits_TE, chosen_TE, self.method.weight_sum or self.k)

    def balance(self, x_TD: Tensor, logits_TE: Tensor, tried_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """Return the weights, and the probability that an expert is chosen again with new noise, ``[2, ..., E]``."""
        best_TE = tried_TE.topk(self.k + 1, dim=-1).values
        to_beat_TE = torch.where(chosen_TE, best_TE[..., self.k :], best_TE[..., self.k - 1 : self.k])
        distance_TE = (logits_TE - to_beat_TE) / self.deviation(x_TD)
        likely_TE = 0.5 * (1 + torch.erf(distance_TE / math.sqrt(2)))
        return torch.stack([softmax_of(tried_TE, chosen_TE, 1.0), likely_TE])

    def balance_loss(self, means_SE: Tensor) -> Tensor:
        """Return the weighted squared coefficients of variation of both, over experts."""
        importance, load = means_SE.var(-1, correction=0) / means_SE.mean(-1).square().clamp_min(1e-10)
        return self.method.importance_weight * importance + self.method.load_weight * load
