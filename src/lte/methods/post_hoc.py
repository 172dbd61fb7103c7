"""The common part of methods that make a trained model sparse without training: a target, and data for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.selection import expert_norms, top_k
from lte.methods.targeted import Targeted
from lte.surgery.convert import set_mode_
from lte.surgery.relufy import ReLUName, check_activation, relufy_
from lte.surgery.sites import FFNSite


@dataclass(frozen=True)
class PostHoc(Targeted):
    """Base of methods without training. Their routers choose 0 or 1, so modes soft and hard are the same.

    Attributes:
        target_sparsity: fraction of idle neurons, in (0, 1).
        tokens: number of tokens of the data, if the method needs data.
        activation: replaces the model's activation first: ``relu``, or its square ``relu2``. The model then needs
            fine-tuning. None keeps the model's own.

    Raises:
        ValueError: an option is outside its range.
    """

    added_later: ClassVar[tuple[str, ...]] = ("activation",)

    tau: float = field(default=0.5, init=False)
    tokens: int = 4096
    activation: ReLUName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, but at least 1 is needed (usual: 4096)")
        if self.activation is not None:
            check_activation(self.activation)

    @property
    def fit_tokens(self) -> int:
        return self.tokens

    def prepare_(self, model: PreTrainedModel) -> Callable[[], None]:
        return super().prepare_(model) if self.activation is None else relufy_(model, self.activation)

    def group(self, sites: Sequence[FFNSite], activations: Sequence[Tensor]) -> Iterable[Tensor]:
        """Return labels that keep the order of neurons. Each neuron is an expert."""
        return [torch.arange(site.d_ff) for site in sites]

    def fit(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        set_mode_(model, "hard")


def most_active(hidden_TF: Tensor, num_experts: int, k: int) -> Tensor:
    """Return True for the ``k`` experts of each token with the longest neurons, if these are not 0."""
    norms_TE = expert_norms(hidden_TF, num_experts)
    return top_k(norms_TE, k) & (norms_TE > 0)
