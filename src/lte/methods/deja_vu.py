"""Deja Vu: a low-rank network predicts from x which neurons matter (Liu et al., arXiv 2310.17157)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.core.grouping import check_divisible
from lte.core.linear import linear_fp32
from lte.methods.choosing import ChoosingRouter, meet_sparsity_
from lte.methods.experts import Grouped
from lte.methods.post_hoc import PostHoc, most_active
from lte.methods.predictors import check_training, train_predictors_
from lte.surgery.sites import FFNSite

Selection = Literal["threshold", "top_k"]


@dataclass(frozen=True)
class DejaVuConfig(Grouped, PostHoc):
    """How to convert a model for Deja Vu: predictors are trained on data, and the model does not change.

    Attributes:
        expert_size: neurons that are predicted together; must divide d_ff (paper: 1).
        seed: of the predictors' start and training, and of grouping.
        target_sparsity: fraction of idle neurons in every layer. A neuron's label says whether it is among the others,
            by ``|h|``, for this token (paper: whether ReLU lets it through).
        tokens: number of tokens of the data for predictors and thresholds.
        activation: ``relu`` or ``relu2`` replaces the model's activation first, which needs fine-tuning; None keeps it.
        rank: of the predictor, which costs ``rank * (D + E)`` weights; None is D / 8.
        selection: ``threshold`` (paper), one for each layer, set on data; or ``top_k``: each token has the same number.
        grouping: with ``expert_size`` above 1, as LTE's.
        fit_epochs: of the predictors' training.
        fit_learning_rate: at the start of this training.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "deja-vu"

    expert_size: int = 1
    rank: int | None = None
    selection: Selection = "threshold"
    fit_epochs: int = 10
    fit_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_training(self.fit_epochs, self.fit_learning_rate)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}, but at least 1 is needed (usual: an eighth of the model's width)")
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection is {self.selection!r}, but it is one of {', '.join(get_args(Selection))}")

    @property
    def needs_activations(self) -> bool:
        return super().needs_activations and self.expert_size > 1

    def check_site(self, site: FFNSite) -> None:
        self.num_active(check_divisible(site.d_ff, self.expert_size))

    def group(self, sites: Sequence[FFNSite], activations: Sequence[Tensor]) -> Iterable[Tensor]:
        if self.expert_size == 1:
            return PostHoc.group(self, sites, activations)
        return super().group(sites, activations)

    def build_router(self, site: FFNSite, device: torch.device) -> "LowRankRouter":
        num_experts = check_divisible(site.d_ff, self.expert_size)
        k = self.num_active(num_experts) if self.selection == "top_k" else None
        return LowRankRouter(site.d_model, num_experts, self.rank or max(1, site.d_model // 8), k, device)

    def fit(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        train_predictors_(
            model,
            batches,
            self.tokens,
            lambda hidden_TF, experts: most_active(hidden_TF, experts, self.num_active(experts)),
            self.fit_epochs,
            self.fit_learning_rate,
            self.seed,
        )
        if self.selection == "threshold":
            meet_sparsity_(model, batches, self.target_sparsity, self.tokens)
        super().fit(model, batches)

    def calibrate(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        if self.selection == "threshold":
            meet_sparsity_(model, batches, self.target_sparsity)


class LowRankRouter(ChoosingRouter):
    """An expert's value is ``up (down x) + bias``: a linear map of low rank.

    Shapes: down ``[R, D]``, up ``[E, R]``, bias ``[E]``; ``[..., D]`` -> ``[..., E]``.
    """

    def __init__(
        self, d_model: int, num_experts: int, rank: int, k: int | None = None, device: torch.device | None = None
    ):
        super().__init__(num_experts, k, device)
        self.down = nn.Parameter(torch.empty(rank, d_model, device=device))
        self.up = nn.Parameter(torch.empty(num_experts, rank, device=device))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device))

    @torch.no_grad()
    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Draw both matrices as ``nn.Linear`` does, on the CPU."""
        for matrix in (self.down, self.up):
            bound = 1 / math.sqrt(matrix.shape[1])
            matrix.copy_(torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator))
        self.bias.fill_(bias)

    def values(self, x_TD: Tensor, /) -> Tensor:
        return linear_fp32(linear_fp32(x_TD, self.down), self.up, self.bias)
