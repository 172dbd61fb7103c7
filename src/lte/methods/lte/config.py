"""LTE: experts by balanced k-means, a linear sigmoid router, a threshold (Zheng et al., NeurIPS 2024)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lte.core.grouping import check_divisible
from lte.methods.experts import Grouped
from lte.modules.compensation import Compensation
from lte.modules.router import Router
from lte.surgery.sites import FFNSite
from lte.surgery.training_options import TrainingOptions, check_target

if TYPE_CHECKING:
    from lte.methods.lte.training import LTETraining


@dataclass(frozen=True)
class LTEConfig(Grouped):
    """How to convert a model for LTE.

    Attributes:
        expert_size: neurons of an expert; must divide d_ff (paper: 32).
        tau: an expert is active if its score is above tau (paper: 0.5).
        grouping: ``kmeans`` on the rows of the first FFN weight (paper), ``coactivation`` from data, or ``random``.
        seed: of grouping and router initialisation.
        compensation_rank: rank R of a linear map that stands in for idle experts. It costs ``2 D R`` weights for each
            token (:class:`~lte.modules.compensation.Compensation`); 0 (paper) is none.
        target_sparsity: fraction of idle neurons after training, in (0, 1); None with ``schedule="paper"``.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "lte"
    soft_computes_all: ClassVar[bool] = True

    added_later: ClassVar[tuple[str, ...]] = ("compensation_rank", "target_sparsity")
    of_training: ClassVar[tuple[str, ...]] = ("target_sparsity",)

    compensation_rank: int = 0
    target_sparsity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_sparsity is not None:
            check_target(self.target_sparsity)
        if self.compensation_rank < 0:
            raise ValueError(f"compensation_rank is {self.compensation_rank}, but a rank is 0 (none) or more")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau is {self.tau}, but scores lie between 0 and 1, so tau does too (usual: 0.5)")

    def training(self, options: TrainingOptions) -> "LTETraining":
        from lte.methods.lte.training import LTETraining  # not needed to convert or load a model

        return LTETraining(self, options)

    def build_router(self, site: FFNSite, device: torch.device) -> Router:
        return Router(site.d_model, check_divisible(site.d_ff, self.expert_size), device)

    def build_compensation(self, site: FFNSite, device: torch.device) -> Compensation | None:
        return Compensation(site.d_model, self.compensation_rank, device) if self.compensation_rank else None
