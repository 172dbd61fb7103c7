"""Routers of a mixture of experts: k experts for each token, scaled by learned weights, and a balance loss."""

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
    """Gives the ``k`` experts of a token with the highest logits ``x W^T + bias`` a weight above 0, and the others 0.

    Shapes: weight ``[E, D]``, bias ``[E]``, ``[..., D]`` -> ``[..., E]``.

    Attributes:
        kept_in: lists to which each pass appends ``[S, ..., E]``, which :meth:`balance_loss` needs.
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
        if learning or lists:  # even if no list keeps it: both passes of gradient checkpointing must be the same
            balance_STE = self.balance(x_TD, logits_TE, tried_TE, chosen_TE)
            for one in lists:
                one.append(balance_STE)
        return self.weigh(tried_TE, chosen_TE)

    def explore(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        """Return the logits by which a learning router chooses experts. A frozen router uses its own logits."""
        return logits_TE

    def weigh(self, logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """Return the weight of each expert ``[..., E]``; 0 if it is not chosen."""
        raise NotImplementedError

    def balance(self, x_TD: Tensor, logits_TE: Tensor, tried_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """Return ``[S, ..., E]``, whose mean over tokens :meth:`balance_loss` takes."""
        raise NotImplementedError

    def balance_loss(self, means_SE: Tensor) -> Tensor:
        """Return the weighted loss of a layer, a scalar, from the means ``[S, E]`` over a batch's real tokens."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"d_model={self.weight.shape[1]}, num_experts={self.num_experts}, k={self.k}"


Balance = dict[str, tuple[MixtureRouter, list[Tensor]]]


@contextmanager
def record_balance(layers: dict[str, Selecting]) -> Iterator[Balance]:
    """Record, inside the context, the values of one forward pass that the balance losses of mixtures need."""
    balance: Balance = {name: (one.router, []) for name, one in layers.items() if isinstance(one.router, MixtureRouter)}
    with kept(balance.values()):
        yield balance


def balance_loss(balance: Balance, recording: Recording) -> Tensor:
    """Return the mean of the layers' balance losses, a scalar. Padding does not count.

    Args:
        balance: of the forward pass of ``recording``.
        recording: says which tokens are not padding.
    """
    losses = []
    for name, (router, parts) in balance.items():
        if not parts:  # the layer did not run in this pass
            continue
        seen_STE = torch.cat(parts, dim=-2)  # several parts if the model runs its FFN in chunks of the sequence
        mask = recording.masks.of(name, seen_STE.shape[1:-1])
        real_STE = seen_STE.flatten(1, -2)
        if mask is None:
            means_SE = real_STE.mean(1)
        else:
            counted_T1 = mask.to(seen_STE.device).ne(0).flatten().unsqueeze(-1)
            means_SE = torch.where(counted_T1, real_STE, 0).sum(1) / counted_T1.sum().clamp_min(1)
        losses.append(router.balance_loss(means_SE))
    return torch.stack(losses).mean()
