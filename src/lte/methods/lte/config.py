"""LTE: experts by balanced k-means, a linear sigmoid router, a threshold (Zheng et al., NeurIPS 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lte.core.accounting import Cost
from lte.core.grouping import check_divisible
from lte.methods.cuts import check_inputs
from lte.methods.experts import Grouped
from lte.modules.compensation import Compensation
from lte.modules.input_threshold import add_cut_
from lte.modules.router import Router
from lte.surgery.cost import cost_per_token, meta_model
from lte.surgery.sites import FFNSite, find_sites, linear_sites
from lte.surgery.training_options import TrainingOptions, check_target

if TYPE_CHECKING:
    from lte.methods.lte.training import LTETraining

_EXPERTS = 96  # the fewest of an FFN, if experts of 8 neurons or more allow it


@dataclass(frozen=True)
class LTEConfig(Grouped):
    """How to convert a model for LTE.

    Attributes:
        expert_size: neurons of an expert; must divide d_ff (paper: 32; ``lte train``: by the model's size).
        tau: an expert is active if its score is above tau (paper: 0.5).
        grouping: ``kmeans`` on the rows of the first FFN weight (paper), ``coactivation`` from data, or ``random``.
        seed: of grouping and router initialisation.
        compensation_rank: rank R of a linear map that stands in for idle experts. It costs ``2 D R`` weights for each
            token (:class:`~lte.modules.compensation.Compensation`); 0 (paper) is none. ``lte train`` takes at most 64.
        target_sparsity: fraction of idle neurons after training, in (0, 1); None with ``schedule="paper"``.
        attention_sparsity: fraction of the inputs of attention's projections that count as 0 in mode hard, in [0, 1).
            The smallest inputs do, by a threshold for each projection (TEAL's). 0 (paper) is none.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "lte"
    soft_computes_all: ClassVar[bool] = True

    added_later: ClassVar[tuple[str, ...]] = ("compensation_rank", "target_sparsity", "attention_sparsity")
    of_training: ClassVar[tuple[str, ...]] = ("target_sparsity",)

    compensation_rank: int = 0
    target_sparsity: float | None = None
    attention_sparsity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_sparsity is not None:
            check_target(self.target_sparsity)
        if self.compensation_rank < 0:
            raise ValueError(f"compensation_rank is {self.compensation_rank}, but a rank is 0 (none) or more")
        if not 0 <= self.attention_sparsity < 1:
            raise ValueError(
                f"attention_sparsity is {self.attention_sparsity}, but it is the fraction of attention's inputs taken "
                "for 0: from 0 (none) to below 1, e.g. 0.25"
            )
        if not 0 < self.tau < 1:
            raise ValueError(f"tau is {self.tau}, but scores lie between 0 and 1, so tau does too (usual: 0.5)")

    @classmethod
    def sized_for(cls, config: PretrainedConfig, **options: Any) -> "LTEConfig":
        """Return a config whose experts and compensation fit the size of a dense model.

        An FFN of 3072 or more neurons has experts of 32 neurons. A smaller one has experts of 16 or 8, so that it has
        about 100 experts. The compensation has rank 64, or less if that is above 3 % of a gated FFN's weights.

        Raises:
            ValueError: an unknown family, or an option is outside its range.
        """
        d_ff = min(site.d_ff for site in find_sites(meta_model(config), config.model_type))
        sizes = [size for size in (32, 16, 8) if d_ff % size == 0] or [cls.expert_size]
        size = next((size for size in sizes if d_ff // size >= _EXPERTS), sizes[-1])
        return cls(**{"expert_size": size, "compensation_rank": min(64, d_ff // 24), **options})

    def check(self, model: PreTrainedModel) -> None:
        super().check(model)
        if self.attention_sparsity:
            check_inputs(model, "attention_sparsity")

    def put_in_(self, model: PreTrainedModel, **state: Any) -> None:
        self._add_cuts_(model)
        super().put_in_(model, **state)

    def install_(self, model: PreTrainedModel) -> None:
        self._add_cuts_(model)
        super().install_(model)

    def _add_cuts_(self, model: PreTrainedModel) -> None:
        """Give attention's projections in all blocks a threshold of 0, if some of their inputs are to be left out."""
        for site in linear_sites(model, model.config.model_type) if self.attention_sparsity else ():
            if not site.in_ffn:
                add_cut_(site.linear, cutting=False)

    def cost(self, model: PreTrainedModel, sparsity: float | Sequence[float] = 0.0) -> Cost:
        return cost_per_token(model, sparsity, self.expert_size, attention_sparsity=self.attention_sparsity)

    def describe(self, config: Any) -> str:
        share = f", {self.attention_sparsity:.0%} of attention's inputs left out" if self.attention_sparsity else ""
        return f"{super().describe(config)}{share}"

    def to_dict(self) -> dict[str, Any]:
        """Return the options. An ``attention_sparsity`` of 0 is left out, so that earlier versions can read them."""
        options = super().to_dict()
        return options if self.attention_sparsity else {n: v for n, v in options.items() if n != "attention_sparsity"}

    def training(self, options: TrainingOptions) -> "LTETraining":
        from lte.methods.lte.training import LTETraining  # not needed to convert or load a model

        return LTETraining(self, options)

    def build_router(self, site: FFNSite, device: torch.device) -> Router:
        return Router(site.d_model, check_divisible(site.d_ff, self.expert_size), device)

    def build_compensation(self, site: FFNSite, device: torch.device) -> Compensation | None:
        return Compensation(site.d_model, self.compensation_rank, device) if self.compensation_rank else None
