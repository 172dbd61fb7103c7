"""Top-k mixture of experts: softmax or sigmoid scores, and a load-balancing loss (Fedus et al., arXiv 2101.03961)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lte.methods.mixture import Mixture, check_weight, softmax_of
from lte.modules.mixture import MixtureRouter
from lte.surgery.sites import FFNSite

Scores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class TopKMoEConfig(Mixture):
    """How to convert a model for a top-k mixture of experts.

    Attributes:
        expert_size: neurons of an expert; must divide d_ff.
        seed: of grouping and router initialisation.
        target_sparsity: fraction of idle neurons, for every token in every layer.
        grouping: ``kmeans`` on the rows of the first FFN weight, ``coactivation`` from data, or ``random``.
        scores: the weight of an expert: ``softmax`` over the chosen experts, or ``sigmoid`` of its own logit.
        weight_sum: the sum of a token's softmax weights. None is k, so that their mean is 1. (Models that are mixtures
            from their first step usually have 1.)
        balance_weight: of the load-balancing loss, which is 1 if all experts are used equally.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "topk-moe"

    scores: Scores = "softmax"
    weight_sum: float | None = None
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("balance_weight", self.balance_weight)
        check_weight_sum(self.weight_sum)
        if self.scores not in get_args(Scores):
            raise ValueError(f"scores is {self.scores!r}, but it is one of {', '.join(get_args(Scores))}")

    def build_router(self, site: FFNSite, device: torch.device) -> "TopKRouter":
        return TopKRouter(self, *self.router_shape(site), device)


class TopKRouter(MixtureRouter):
    """Gives weights by softmax over the chosen experts, or by sigmoid."""

    def __init__(
        self, method: TopKMoEConfig, d_model: int, num_experts: int, k: int, device: torch.device | None = None
    ):
        super().__init__(d_model, num_experts, k, device)
        self.method = method

    def weigh(self, logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        if self.method.scores == "sigmoid":
            return logits_TE.sigmoid() * chosen_TE
        return softmax_of(logits_TE, chosen_TE, self.method.weight_sum or self.k)

    def balance(self, x_TD: Tensor, logits_TE: Tensor, tried_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        if self.method.scores == "sigmoid":
            share_TE = torch.nn.functional.normalize(logits_TE.sigmoid(), p=1.0, dim=-1)
        else:
            share_TE = logits_TE.softmax(-1)
        return torch.stack([chosen_TE.to(share_TE.dtype) / self.k, share_TE])

    def balance_loss(self, means_SE: Tensor) -> Tensor:
        """Return ``E sum_e f_e P_e``: f is an expert's share of choices, P its mean share of the scores."""
        return self.method.balance_weight * self.num_experts * (means_SE[0] * means_SE[1]).sum()


def check_weight_sum(weight_sum: float | None) -> None:
    """Raise ValueError unless the sum of weights is positive."""
    if weight_sum is not None and not weight_sum > 0:
        raise ValueError(f"weight_sum is {weight_sum}, but the sum of weights is above 0 (leave it out for k)")
