"""Sigma-MoE: sigmoid scores, expert dropout, entropy of what a batch uses (Csordas et al., arXiv 2310.10837)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lte.methods.mixture import Mixture, check_weight
from lte.modules.mixture import MixtureRouter
from lte.surgery.sites import FFNSite


@dataclass(frozen=True)
class SigmaMoEConfig(Mixture):
    """How to convert a model for sigma-MoE.

    Attributes:
        expert_size: neurons an expert; must divide d_ff.
        seed: of grouping and router initialisation.
        target_sparsity: fraction of neurons to leave idle, for every token in every layer.
        grouping: ``kmeans`` on the rows of the first FFN weight, ``coactivation`` from data, or ``random``.
        expert_dropout: how likely a token cannot choose an expert, while routers learn (authors' advice: 0.05).
        entropy_weight: of the entropy that a batch's mean scores are to have.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str] = "sigma-moe"

    expert_dropout: float = 0.05
    entropy_weight: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("entropy_weight", self.entropy_weight)
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout is {self.expert_dropout}, but it is a share in [0, 1), e.g. 0.05")

    def build_router(self, site: FFNSite, device: torch.device) -> "SigmaRouter":
        return SigmaRouter(self, *self.router_shape(site), device)


class SigmaRouter(MixtureRouter):
    """Weights by sigmoid."""

    def __init__(
        self, method: SigmaMoEConfig, d_model: int, num_experts: int, k: int, device: torch.device | None = None
    ):
        super().__init__(d_model, num_experts, k, device)
        self.method = method

    @torch.no_grad()
    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Directions at random, all rows of one length: none begins more likely than another (paper)."""
        super().reset(bias, generator)
        self.weight.copy_(normalize(self.weight.float(), dim=1) * self.weight.float().norm(dim=1).mean())

    def explore(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        dropped_TE = torch.rand_like(logits_TE) < self.method.expert_dropout
        return logits_TE.masked_fill(dropped_TE, float("-inf"))

    def weigh(self, logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid() * chosen_TE

    def balance(self, x_TD: Tensor, logits_TE: Tensor, tried_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1).unsqueeze(0)

    def balance_loss(self, means_SE: Tensor) -> Tensor:
        """``sum_e p_e log p_e``: least where a batch's tokens together want all experts alike."""
        return self.method.entropy_weight * torch.special.xlogy(means_SE, means_SE).sum()
