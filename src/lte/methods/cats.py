"""CATS: a neuron is skipped if its activation is small (Lee et al., arXiv 2404.08763)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.methods.choosing import ChoosingRouter, meet_sparsity_
from lte.methods.post_hoc import PostHoc
from lte.modules.router import Reads
from lte.surgery.sites import FFNSite


@dataclass(frozen=True)
class CATSConfig(PostHoc):
    """How to convert a model for CATS: one threshold for each layer, set on data, without training.

    A neuron is active if ``|act(gate)|`` is above its layer's threshold. In an FFN without a gate this is
    ``|act(up)|``. The projection before the activation is computed for all neurons, and its cost is counted.

    Attributes:
        target_sparsity: fraction of idle neurons, in every layer.
        tokens: number of tokens of the data for the thresholds.
        activation: ``relu`` or ``relu2`` replaces the model's activation first, which needs fine-tuning; None keeps it.

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "cats"

    expert_size: int = field(default=1, init=False)
    seed: int = field(default=0, init=False)

    def build_router(self, site: FFNSite, device: torch.device) -> "ActivationRouter":
        return ActivationRouter(site.d_ff, device=device)

    def fit(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        meet_sparsity_(model, batches, self.target_sparsity, self.tokens)

    def calibrate(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        meet_sparsity_(model, batches, self.target_sparsity)


class ActivationRouter(ChoosingRouter):
    """Gives True where ``|activation| > cut``. Shapes: ``[..., F]`` -> ``[..., F]``."""

    reads: ClassVar[Reads] = "activation"

    def values(self, fired_TF: Tensor, /) -> Tensor:
        return fired_TF.abs()
