"""Static pruning: the same neurons are left out for every token. Methods that choose by token must be better."""

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.selection import top_k
from lte.methods.post_hoc import PostHoc
from lte.modules.router import BaseRouter
from lte.surgery.activations import record_inputs
from lte.surgery.sites import FFNSite, find_sites


@dataclass(frozen=True)
class StaticPruningConfig(PostHoc):
    """How to prune whole neurons: those with the least mean ``|h| * |down row|`` on data, the same share of each layer.

    Fine-tuning does not change the choice.

    Attributes:
        target_sparsity: fraction of each layer's neurons that are left out.
        tokens: number of tokens of the data for the choice.
        activation: ``relu`` or ``relu2`` replaces the model's activation first, which needs fine-tuning; None keeps it.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "static-pruning"

    expert_size: int = field(default=1, init=False)
    seed: int = field(default=0, init=False)

    def check_site(self, site: FFNSite) -> None:
        self.num_active(site.d_ff)

    def build_router(self, site: FFNSite, device: torch.device) -> "FixedRouter":
        return FixedRouter(site.d_ff, device)

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        sites = find_sites(model, model.config.model_type)
        wanted = [(site.name, site.down, _summed) for site in sites]
        for site, sums in zip(sites, record_inputs(model, wanted, batches, self.tokens), strict=True):
            rows_FD = site.down_rows().float()
            importance_F = sums.sum(0).to(rows_FD.device) * rows_FD.norm(dim=1)
            cast(FixedRouter, site.installed.router).kept_F.copy_(top_k(importance_F, self.num_active(site.d_ff)))
        super().fit(model, batches)


class FixedRouter(BaseRouter):
    """Gives the same neurons for every token: ``kept_F``. It costs nothing."""

    kept_F: Tensor

    def __init__(self, num_neurons: int, device: torch.device | None = None):
        super().__init__(num_neurons)
        self.register_buffer("kept_F", torch.ones(num_neurons, dtype=torch.bool, device=device))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.kept_F.expand(*x_TD.shape[:-1], -1)


def _summed(hidden_TF: Tensor) -> Tensor:
    return hidden_TF.float().abs().sum(0, keepdim=True)
