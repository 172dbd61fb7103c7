"""Routers that only choose: by a cut that is set on data, or the same number of experts for every token."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.selection import top_k
from lte.methods.cuts import sample, set_cuts_
from lte.modules.recording import sparse_layers
from lte.modules.router import BaseRouter
from lte.surgery.activations import Wanted
from lte.surgery.convert import set_mode_


class ChoosingRouter(BaseRouter):
    """Gives True for the ``k`` experts of a token with the highest values, or without ``k`` for those above ``cut``.

    Shapes: its argument -> ``[..., E]``; the buffer ``cut`` is a scalar.
    """

    cut: Tensor

    def __init__(self, num_experts: int, k: int | None = None, device: torch.device | None = None):
        super().__init__(num_experts)
        self.k = k
        if k is None:
            self.register_buffer("cut", torch.zeros((), device=device))

    def values(self, read: Tensor, /) -> Tensor:
        """Return ``[..., E]``. Experts with higher values are used first."""
        raise NotImplementedError

    def forward(self, read: Tensor) -> Tensor:
        values_TE = self.values(read)
        return values_TE > self.cut if self.k is None else top_k(values_TE, self.k)


def meet_sparsity_(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], sparsity: float, most_tokens: int | None = None
) -> None:
    """Set the cut of every layer so that ``sparsity`` of its experts are idle on ``batches``. Set mode hard."""
    tokens = count_tokens(batches)
    tokens = tokens if most_tokens is None else min(tokens, most_tokens)
    routers = {name: cast(ChoosingRouter, layer.router) for name, layer in sparse_layers(model).items()}
    set_mode_(model, "hard")
    for router in routers.values():
        router.cut.fill_(-torch.inf)
    wanted: list[Wanted] = [
        (name, router, lambda read, router=router: sample(router.values(read), tokens))
        for name, router in routers.items()
    ]
    set_cuts_(model, wanted, [sparsity] * len(wanted), batches, tokens)


def count_tokens(batches: list[dict[str, Tensor]]) -> int:
    """Return the number of tokens of all batches, including padding."""
    return sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)
