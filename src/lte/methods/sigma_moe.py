"""Sigma-MoE: sigmoid scores, expert dropout, and an entropy loss (Csordas et al., arXiv 2310.10837)."""

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
        expert_size: neurons of an expert; must divide d_ff.
        seed: of grouping and router initialisation.
        target_sparsity: fraction of idle neurons, for every token in every layer.
        grouping: ``kmeans`` on the rows of the first FFN weight, ``coactivation`` from data, or ``random``.
        expert_dropout: probability that a token cannot choose an expert while routers learn (authors' advice: 0.05).
        entropy_weight: weight of the loss that raises the entropy of a batch's mean scores.

    Raises:
        ValueError: an option is outside its range.
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
    """Gives weights by sigmoid."""

    def __init__(
        self, method: SigmaMoEConfig, d_model: int, num_experts: int, k: int, device: torch.device | None = None
    ):
        super().__init__(d_model, num_experts, k, device)
        self.method = method

    @torch.no_grad()
    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Draw random rows of the same length, so that all experts start equally likely (paper)."""
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
        """Return ``sum_e p_e log p_e``. It is least if a batch's tokens together use all experts equally."""
        return self.method.entropy_weight * torch.special.xlogy(means_SE, means_SE).sum()
