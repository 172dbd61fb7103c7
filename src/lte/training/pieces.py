"""The loss of a causal model in pieces: logits of a few tokens at a time, so that all logits are never in memory.

The output head runs inside the loss. A model whose head is passed over gives hidden states in place of logits. The
gradient of a piece is computed with the piece, as in Liger Kernel (Hsu et al., 2024, arXiv 2410.10989, section 3.3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte.modules.evaluating import evaluating
from lte.training.distillation import DistilledLoss, is_causal, mix_rows

_LOGITS = 2**26
"""Logits of a piece: 256 MB in fp32, of which a few copies exist at a time."""


class PiecewiseLoss(DistilledLoss):
    """As :class:`~lte.training.distillation.DistilledLoss`, for a model whose head is passed over.

    Args:
        head: of the student.
        teacher: hidden states ``[..., D]`` of the teacher before its head; None without a teacher.
        teacher_head: the teacher's.
        share: of the divergence from the teacher.
    """

    def __init__(self, head: nn.Linear, teacher: Tensor | None, teacher_head: nn.Linear | None, share: float):
        super().__init__(teacher, share, None)  # pyright: ignore[reportArgumentType]
        self.head, self.teacher_head = head, teacher_head

    def sums(self, student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mix, cross entropy and KL, summed over rows, from the student's hidden states ``[..., D]``."""
        inner = None if self.teacher_head is None else self._of(self.teacher_head, self.teacher)
        hidden_TD, weight_VD, bias_V = self._of(self.head, student)
        return _SummedPieces.apply(hidden_TD, weight_VD, bias_V, inner, labels.reshape(-1, 1), self.share)  # pyright: ignore

    @staticmethod
    def _of(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden states, weight and bias in the dtype of the head's output."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        return hidden.reshape(-1, hidden.shape[-1]).to(dtype), head.weight.to(dtype), bias


@contextmanager
def headless(head: nn.Linear | None) -> Iterator[None]:
    """Pass over an output head inside the context: its model gives hidden states as logits. None changes nothing."""
    if head is None:
        yield
        return
    with _instead(head, lambda hidden: hidden):
        yield


def check_pieces(model: Any) -> nn.Linear:
    """Return the output head of a causal model.

    Raises:
        ValueError: the model is not causal, its head is not one linear layer, or it changes the logits of its head.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if not is_causal(model):
        raise ValueError(f"loss_in_pieces is for causal language models, and {name} is none: drop it")
    if type(head) is not nn.Linear:
        raise ValueError(f"loss_in_pieces needs a model whose head is one linear layer, which {name} has not: drop it")
    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    probe = torch.linspace(-100, 100, head.out_features, device=ids.device, dtype=head.weight.dtype).expand(1, 2, -1)
    with torch.no_grad(), evaluating(model), _instead(head, lambda _hidden: probe):
        logits = model(input_ids=ids).logits
    if not torch.equal(logits.to(probe.dtype), probe):
        raise ValueError(f"{name} changes the logits of its head (it caps or scales them): drop loss_in_pieces")
    return head


@contextmanager
def _instead(head: nn.Module, forward: Any) -> Iterator[None]:
    own = vars(head).get("forward")
    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]
        if own is not None:
            vars(head)["forward"] = own


class _SummedPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        labels_T1: Tensor,
        share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cross_entropy = kl = torch.zeros((), device=hidden_TD.device)
        hidden_gradient_TD = torch.empty_like(hidden_TD)
        trains = ctx.needs_input_grad[1], bias_V is not None and ctx.needs_input_grad[2]
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if trains[0] else None
        bias_gradient_V = torch.zeros_like(bias_V, dtype=torch.float32) if trains[1] else None  # pyright: ignore
        step = max(1, _LOGITS // len(weight_VD))
        for start in range(0, len(hidden_TD), step):
            rows = slice(start, start + step)
            logits_RV = F.linear(hidden_TD[rows], weight_VD, bias_V)
            target_RV = logits_RV if teacher is None else F.linear(teacher[0][rows], *teacher[1:])
            more_cross_entropy, more_kl, gradient_RV = mix_rows(logits_RV, target_RV, labels_T1[rows], share)
            cross_entropy, kl = cross_entropy + more_cross_entropy, kl + more_kl
            hidden_gradient_TD[rows] = gradient_RV @ weight_VD
            if weight_gradient_VD is not None:
                weight_gradient_VD += gradient_RV.T @ hidden_TD[rows]
            if bias_gradient_V is not None:
                bias_gradient_V += gradient_RV.sum(0)
        ctx.save_for_backward(hidden_gradient_TD, weight_gradient_VD, bias_gradient_V)
        ctx.mark_non_differentiable(cross_entropy, kl)
        return (1 - share) * cross_entropy + share * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        found = [None if one is None else one.mul_(outputs[0].to(one.dtype)) for one in ctx.saved_tensors]
        return *found, None, None, None
