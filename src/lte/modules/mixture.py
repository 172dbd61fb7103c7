"""Routers of a mixture of experts: k experts a token, scaled by learned weights, and a loss that keeps all in use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lte.core.linear import linear_fp32
from lte.core.selection import top_k
from lte.modules.kept import Kept, kept, of_this_thread
from lte.modules.recording import Recording
from lte.modules.router import BaseRouter, draw_
from lte.modules.sparse_ffn import Selecting


class MixtureRouter(BaseRouter):
    """The ``k`` experts of a token with the highest logits ``x W^T + bias``, each with a weight above 0; others 0.

    Shapes: weight ``[E, D]``, bias ``[E]``, ``[..., D]`` -> ``[..., E]``.

    Attributes:
        kept_in: lists to which each pass appends what :meth:`balance_loss` is made of, ``[S, ..., E]``.
    """

    scales = True

    def __init__(self, d_model: int, num_experts: int, k: int, device: torch.device | None = None):
        super().__init__(num_experts)
        self.k = k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device))
        self.kept_in: Kept = []

    @property
    def num_weights(self) -> int:
        return self.weight.numel()

    @torch.no_grad()
    def reset(self, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Draw the weight as LTE's router does."""
        draw_(self.weight, generator)
        self.bias.fill_(bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = linear_fp32(x_TD, self.weight, self.bias)
        learning = self.training and self.weight.requires_grad
        tried_TE = self.explore(x_TD, logits_TE) if learning else logits_TE
        chosen_TE = top_k(tried_TE, self.k)
        lists = of_this_thread(self.kept_in)
        if learning or lists:  # also where nobody keeps it: gradient checkpointing runs this twice, alike
            balance_STE = self.balance(x_TD, logits_TE, tried_TE, chosen_TE)
            for one in lists:
                one.append(balance_STE)
        return self.weigh(tried_TE, chosen_TE)

    def explore(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        """The logits that experts are chosen by while the router learns; frozen, it takes them as they are."""
        return logits_TE

    def weigh(self, logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """The weight of each expert; 0 where it is not chosen."""
        raise NotImplementedError

    def balance(self, x_TD: Tensor, logits_TE: Tensor, tried_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """``[S, ..., E]``: what is averaged over tokens for :meth:`balance_loss`."""
        raise NotImplementedError

    def balance_loss(self, means_SE: Tensor) -> Tensor:
        """The weighted loss of a layer, from the means over a batch's real tokens."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"d_model={self.weight.shape[1]}, num_experts={self.num_experts}, k={self.k}"


Balance = dict[str, tuple[MixtureRouter, list[Tensor]]]


@contextmanager
def record_balance(layers: dict[str, Selecting]) -> Iterator[Balance]:
    """Within it, the mixtures among ``layers`` keep what their balance losses need of one forward pass."""
    balance: Balance = {name: (one.router, []) for name, one in layers.items() if isinstance(one.router, MixtureRouter)}
    with kept(balance.values()):
        yield balance


def balance_loss(balance: Balance, recording: Recording) -> Tensor:
    """Mean over layers of their balance losses; padding does not count.

    Args:
        balance: of the forward pass that ``recording`` is of.
        recording: says which tokens are real.
    """
    losses = []
    for name, (router, parts) in balance.items():
        if not parts:  # not run in this pass
            continue
        seen_STE = torch.cat(parts, dim=-2)  # in parts where the model runs its FFN in chunks of the sequence
        mask = recording.masks.of(name, seen_STE.shape[1:-1])
        real_STE = seen_STE.flatten(1, -2)
        if mask is None:
            means_SE = real_STE.mean(1)
        else:
            counted_T1 = mask.to(seen_STE.device).ne(0).flatten().unsqueeze(-1)
            means_SE = torch.where(counted_T1, real_STE, 0).sum(1) / counted_T1.sum().clamp_min(1)
        losses.append(router.balance_loss(means_SE))
    return torch.stack(losses).mean()
