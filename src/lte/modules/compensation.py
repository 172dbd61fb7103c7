"""Low-rank compensation: a small linear map that stands in for the experts that a token does not use."""

import torch
from torch import Tensor, nn

from lte.modules.router import draw_
from lte.ops import reference
from lte.ops.weights import LowRank, Matrix


class Compensation(nn.Module):
    """``(1 - mean weight of the experts) * expand (compress x + bias)``, added to the FFN's output.

    The output of idle experts is partly linear in the FFN's input, and this part has a low rank. A token that uses all
    experts gets no compensation, so the model can still compute the dense function. Compensation is not a part of
    LTE's paper. LoSparse compensates pruned weights in this way (Li et al., ICML 2023, arXiv 2306.11222).

    The parameters are not those of an ``nn.Linear``, so that tools that rewrite linear layers do not change them.

    Shapes: compress ``[R, D]``, bias ``[R]``, expand ``[D, R]``; input ``[..., D]`` and weights ``[..., E]`` give
    ``[..., D]``.
    """

    def __init__(self, d_model: int, rank: int, device: torch.device | None = None):
        super().__init__()
        self.compress = nn.Parameter(torch.empty(rank, d_model, device=device))
        self.bias = nn.Parameter(torch.empty(rank, device=device))
        self.expand = nn.Parameter(torch.empty(d_model, rank, device=device))

    @property
    def num_weights(self) -> int:
        """The weights that a token multiplies: those of both matrices."""
        return self.compress.numel() + self.expand.numel()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights so that the compensation adds nothing and can learn."""
        draw_(self.compress, generator)
        self.bias.zero_()
        self.expand.zero_()

    @property
    def weights(self) -> LowRank:
        """The weights as the operation takes them."""
        return LowRank(Matrix(self.compress), self.bias, Matrix(self.expand))

    def forward(self, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        return reference.compensation(x_TD, self.weights, weights_TE)

    def extra_repr(self) -> str:
        return f"d_model={self.compress.shape[1]}, rank={self.compress.shape[0]}"
