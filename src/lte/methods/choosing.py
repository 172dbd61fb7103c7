"""Routers that only choose: by a cut set on data, or the same number of experts for every token."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.selection import top_k
from lte.modules.recording import sparse_layers
from lte.modules.router import BaseRouter
from lte.surgery.activations import Wanted, record_inputs
from lte.surgery.convert import set_mode_

_SAMPLE = 1_000_000  # values of a layer that its cut is taken from
_PASSES = 2  # a cut moves what the layers behind it see


class ChoosingRouter(BaseRouter):
    """True for the ``k`` experts of a token with the highest values; without ``k``, for those above ``cut``.

    Shapes: what it reads -> ``[..., E]``; the buffer ``cut`` is a scalar.
    """

    cut: Tensor

    def __init__(self, num_experts: int, k: int | None = None, device: torch.device | None = None):
        super().__init__(num_experts)
        self.k = k
        if k is None:
            self.register_buffer("cut", torch.zeros((), device=device))

    def values(self, read: Tensor, /) -> Tensor:
        """``[..., E]``: the higher, the rather an expert is used."""
        raise NotImplementedError

    def forward(self, read: Tensor) -> Tensor:
        values_TE = self.values(read)
        return values_TE > self.cut if self.k is None else top_k(values_TE, self.k)


@torch.no_grad()
def set_cuts_(model: PreTrainedModel, batches: list[dict[str, Tensor]], sparsity: float, tokens: int) -> None:
    """Set the cut of every layer so that ``sparsity`` of its experts are idle on ``batches``; leaves mode hard.

    The cut is the quantile of the layer's own values, first on what the dense model shows, then once more on what the
    layer sees behind layers that are sparse by then.
    """
    routers = {name: cast(ChoosingRouter, layer.router) for name, layer in sparse_layers(model).items()}
    set_mode_(model, "hard")
    for router in routers.values():
        router.cut.fill_(-torch.inf)
    for _ in range(_PASSES):
        wanted = [_values_of(name, router, tokens) for name, router in routers.items()]
        for router, values in zip(routers.values(), record_inputs(model, wanted, batches, tokens), strict=True):
            router.cut.copy_(values.kthvalue(min(len(values), max(1, round(sparsity * len(values))))).values)


def count_tokens(batches: list[dict[str, Tensor]]) -> int:
    """Of all batches, padding counted too."""
    return sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)


def _values_of(name: str, router: ChoosingRouter, tokens: int) -> Wanted:
    """Every token with some of its experts, in turn: tokens differ much."""
    stride = max(1, tokens * router.num_experts // _SAMPLE)
    while stride > 1 and router.num_experts % stride == 0:
        stride += 1
    return name, router, lambda read: router.values(read).float().flatten()[::stride]
