"""Low-rank compensation: a small linear stand-in for the experts that a token leaves out."""

import torch
from torch import Tensor, nn

from lte.modules.router import draw_
from lte.ops import reference
from lte.ops.weights import LowRank, Matrix


class Compensation(nn.Module):
    """``(1 - mean weight of the experts) * expand (compress x + bias)``, added to the FFN's output.

    What idle experts would have added is partly linear in the FFN's input, and of low rank. A token that uses all
    experts gets nothing, so that the function of the dense model stays within reach. Not part of LTE's paper; pruning
    of weights is compensated so in LoSparse (Li et al., ICML 2023, arXiv 2306.11222).

    Its parameters are not those of an ``nn.Linear``, so that tools which rewrite linear layers leave it be.

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
        """What a token costs it: the weights of its matrices."""
        return self.compress.numel() + self.expand.numel()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Such that it adds nothing, and can learn."""
        draw_(self.compress, generator)
        self.bias.zero_()
        self.expand.zero_()

    @property
    def weights(self) -> LowRank:
        """Its weights as the operation takes them."""
        return LowRank(Matrix(self.compress), self.bias, Matrix(self.expand))

    def forward(self, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        return reference.compensation(x_TD, self.weights, weights_TE)

    def extra_repr(self) -> str:
        return f"d_model={self.compress.shape[1]}, rank={self.compress.shape[0]}"
