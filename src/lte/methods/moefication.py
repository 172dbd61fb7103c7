"""MoEfication: experts of similar neurons, the same number for every token (Zhang et al., arXiv 2110.01786)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from lte.core.grouping import check_divisible
from lte.core.linear import linear_fp32
from lte.core.selection import expert_norms
from lte.methods.choosing import ChoosingRouter
from lte.methods.experts import Grouped
from lte.methods.post_hoc import PostHoc
from lte.methods.predictors import check_training, train_predictors_
from lte.modules.router import Reads
from lte.surgery.sites import FFNSite, find_sites

Selection = Literal["mlp", "similarity", "oracle"]


@dataclass(frozen=True)
class MoEficationConfig(Grouped, PostHoc):
    """How to convert a model by MoEfication.

    Every token uses ``round((1 - target_sparsity) * E)`` of a layer's E experts.

    Attributes:
        expert_size: neurons of an expert; must divide d_ff (paper: 32).
        seed: of grouping and of the routers' training.
        target_sparsity: fraction of idle neurons, for every token in every layer.
        tokens: number of tokens of the data for the routers' training.
        activation: ``relu`` or ``relu2`` replaces the model's activation first, which needs fine-tuning; None keeps it.
        selection: ``mlp``, a router of two layers trained on data (paper); ``similarity`` of x and the expert's mean
            row of the first weight, without data (paper); ``oracle``, the experts with the longest neurons. The oracle
            is an upper bound: it computes all neurons, and their cost is counted.
        grouping: ``kmeans`` on the rows of the first FFN weight (paper), ``coactivation`` from data, or ``random``.
        fit_epochs: of the training of ``mlp``.
        fit_learning_rate: at the start of this training.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "moefication"

    selection: Selection = "mlp"
    fit_epochs: int = 30
    fit_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_training(self.fit_epochs, self.fit_learning_rate)
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection is {self.selection!r}, but it is one of {', '.join(get_args(Selection))}")

    @property
    def fit_tokens(self) -> int:
        return self.tokens if self.selection == "mlp" else 0

    def check_site(self, site: FFNSite) -> None:
        self.num_active(check_divisible(site.d_ff, self.expert_size))

    def build_router(self, site: FFNSite, device: torch.device) -> "ChoosingRouter":
        num_experts = check_divisible(site.d_ff, self.expert_size)
        k = self.num_active(num_experts)
        if self.selection == "oracle":
            return OracleRouter(num_experts, k)
        router = MLPRouter if self.selection == "mlp" else SimilarityRouter
        return router(site.d_model, num_experts, k, device)

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        if self.selection != "oracle":
            for site in find_sites(model, model.config.model_type):
                router = cast(SimilarityRouter, site.installed.router)
                rows_FD = normalize(site.feature_rows().float(), dim=1)
                router.start(normalize(rows_FD.unflatten(0, (router.num_experts, -1)).mean(1), dim=1))
        if self.selection == "mlp":
            train_predictors_(
                model, batches, self.tokens, expert_norms, self.fit_epochs, self.fit_learning_rate, self.seed
            )
        super().fit(model, batches)


class OracleRouter(ChoosingRouter):
    """The value of an expert is the L2 length of its neurons. Shapes: ``[..., F]`` -> ``[..., E]``."""

    reads: ClassVar[Reads] = "neurons"

    def values(self, hidden_TF: Tensor, /) -> Tensor:
        return expert_norms(hidden_TF, self.num_experts)


class SimilarityRouter(ChoosingRouter):
    """An expert's value is the cosine of x and its centre. Shapes: weight ``[E, D]``, ``[..., D]`` -> ``[..., E]``."""

    def __init__(self, d_model: int, num_experts: int, k: int, device: torch.device | None = None):
        super().__init__(num_experts, k)
        self.weight = nn.Parameter(torch.zeros(num_experts, d_model, device=device))

    def start(self, centres_ED: Tensor) -> None:
        self.weight.copy_(centres_ED)

    def values(self, x_TD: Tensor, /) -> Tensor:
        return linear_fp32(normalize(x_TD.float(), dim=-1), self.weight)


class MLPRouter(SimilarityRouter):
    """The values are ``mix tanh(weight x)``, with x scaled to length 1. Shapes: weight ``[E, D]``, mix ``[E, E]``."""

    def __init__(self, d_model: int, num_experts: int, k: int, device: torch.device | None = None):
        super().__init__(d_model, num_experts, k, device)
        self.mix = nn.Parameter(torch.zeros(num_experts, num_experts, device=device))

    def start(self, centres_ED: Tensor) -> None:
        super().start(centres_ED)
        self.mix.copy_(torch.eye(self.num_experts))

    def values(self, x_TD: Tensor, /) -> Tensor:
        return linear_fp32(super().values(x_TD).tanh(), self.mix)
