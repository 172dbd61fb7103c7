"""What methods share that make a trained model sparse without training it: a sparsity, and data to meet it on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.selection import expert_norms, top_k
from lte.surgery.convert import set_mode_
from lte.surgery.method import Method
from lte.surgery.sites import Site


@dataclass(frozen=True)
class PostHoc(Method):
    """Base of such methods. Their routers choose, 0 or 1, so modes soft and hard are the same.

    Attributes:
        target_sparsity: fraction of neurons to leave idle, in (0, 1).
        tokens: how many tokens of the data to look at, where the method looks at any.

    Raises:
        ValueError: an option outside its range.
    """

    tau: float = field(default=0.5, init=False)
    target_sparsity: float = 0.5
    tokens: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}, but it is the fraction of idle neurons: "
                "between 0 and 1, e.g. 0.5"
            )
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, but at least 1 is needed (usual: 4096)")

    @property
    def data_tokens(self) -> int:
        return self.tokens

    def group(self, site: Site, activations_TF: Tensor | None, layer_index: int) -> Tensor:
        """Neurons stay where they are, each an expert of its own."""
        return torch.arange(site.d_ff)

    def fit(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        set_mode_(model, "hard")

    def num_active(self, num_experts: int) -> int:
        """How many experts a token uses.

        Raises:
            ValueError: none.
        """
        count = round((1 - self.target_sparsity) * num_experts)
        if count < 1:
            raise ValueError(
                f"target_sparsity {self.target_sparsity} leaves none of {num_experts} experts: ask for less, "
                "or for smaller experts"
            )
        return count


def most_active(hidden_TF: Tensor, num_experts: int, k: int) -> Tensor:
    """True for the ``k`` experts of each token whose neurons are longest, if they are not 0."""
    norms_TE = expert_norms(hidden_TF, num_experts)
    return top_k(norms_TE, k) & (norms_TE > 0)
