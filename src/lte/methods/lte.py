"""LTE: experts by balanced k-means, a linear sigmoid router, a threshold (Zheng et al., NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lte.core.grouping import (
    balanced_kmeans,
    check_divisible,
    coactivation_grouping,
    random_grouping,
)
from lte.modules.router import Router
from lte.surgery.method import Method
from lte.surgery.sites import Site

Grouping = Literal["kmeans", "coactivation", "random"]


@dataclass(frozen=True)
class LTEConfig(Method):
    """How to convert a model for LTE.

    Attributes:
        expert_size: neurons an expert; must divide d_ff (paper: 32).
        tau: an expert is active when its score is above it (paper: 0.5).
        grouping: ``kmeans`` on the rows of the first FFN weight (paper), ``coactivation`` from data, or ``random``.
        seed: of grouping and router initialisation.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str] = "lte"

    grouping: Grouping = "kmeans"

    def __post_init__(self) -> None:
        if self.expert_size < 1:
            raise ValueError(f"expert_size is {self.expert_size}, but an expert has at least 1 neuron (usual: 32)")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau is {self.tau}, but scores lie between 0 and 1, so tau does too (usual: 0.5)")
        if self.grouping not in get_args(Grouping):
            raise ValueError(f"grouping is {self.grouping!r}, but it is one of {', '.join(get_args(Grouping))}")

    @property
    def needs_activations(self) -> bool:
        return self.grouping == "coactivation"

    def group(self, site: Site, activations_TF: Tensor | None, layer_index: int) -> Tensor:
        num_experts = check_divisible(site.d_ff, self.expert_size)
        seed = self.seed + layer_index
        if self.grouping == "random":
            return random_grouping(site.d_ff, num_experts, seed)
        if self.grouping == "kmeans":
            return balanced_kmeans(site.feature_rows(), num_experts, seed)
        assert activations_TF is not None
        return coactivation_grouping(activations_TF.to(site.feature_rows().device), num_experts, seed)

    def build_router(self, site: Site, device: torch.device) -> Router:
        return Router(site.d_model, check_divisible(site.d_ff, self.expert_size), device)
