"""The distillation losses: KL divergence from a teacher's next-token distribution, and the error of hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lte.training.calibration import evaluating

_ROWS = 2048
"""Rows worked on at a time: a vocabulary in fp32 is large."""


def summed_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``sum KL(teacher || student)`` over rows, in fp32.

    Done in pieces, with the gradient worked out on the way: plain autograd keeps several fp32 copies of all logits.

    Args:
        student: logits ``[..., V]``, with gradient.
        teacher: logits of the same shape, without.
        mask: which rows count, ``[...]``; None for all.

    Returns:
        A scalar. Its gradient has the student's dtype.
    """
    vocabulary = student.shape[-1]
    every = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    logits = student.reshape(-1, vocabulary), teacher.reshape(-1, vocabulary)
    return _SummedKL.apply(*logits, every.reshape(-1, 1))  # pyright: ignore


def hidden_state_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """``|s - t|^2 / |t|^2``, mean over tokens and layers, in fp32.

    Each token counts alike. In the ratio of the means the first token of a text would be nearly all there is in the
    middle of a model: in blocks 11 to 20 of SmolLM2-135M it has 90 to 97 % of the squares of a row of 1024.
    For backward it keeps one fp32 tensor a layer, and not the teacher's.

    Args:
        student: hidden states ``[..., D]`` by layer, with gradient.
        teacher: the same of the teacher, without.
        mask: which tokens count, ``[...]``; None for all.
    """
    total = torch.zeros((), device=student[0].device)
    for student_TD, teacher_TD in zip(student, teacher, strict=True):
        error_TD, size_T = student_TD.float() - teacher_TD.float(), teacher_TD.float().square().sum(-1)
        if mask is not None:  # where, not a product: padding may hold infinities
            counts_T = mask.bool()
            error_TD, size_T = torch.where(counts_T.unsqueeze(-1), error_TD, 0), torch.where(counts_T, size_T, 1)
        tokens = size_T.numel() if mask is None else mask.bool().sum()
        total = total + (error_TD.square().sum(-1) / size_T).sum() / tokens
    return total / len(student)


@torch.no_grad()
def show_hidden_states_(model: nn.Module) -> None:
    """Have transformers put its hooks on the blocks now, which it does when hidden states are first asked for.

    A compiled model cannot: it would be cut into pieces there.
    """
    inputs: Any = model.dummy_inputs
    device = next(model.parameters()).device
    with evaluating(model):
        model(**{name: value.to(device) for name, value in inputs.items()}, output_hidden_states=True)


class _SummedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_RV: Tensor, teacher_RV: Tensor, counts_R1: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student_RV.device)
        gradient_RV = torch.empty_like(student_RV)
        pieces = zip(*(one.split(_ROWS) for one in (student_RV, teacher_RV, counts_R1, gradient_RV)), strict=True)
        for student, teacher, counts, gradient in pieces:
            log_student, log_teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
            target = log_teacher.exp()
            # where, not a product: a row that does not count may hold infinities
            total += torch.where(counts, target * (log_teacher - log_student), 0).sum()
            gradient.copy_(torch.where(counts, log_student.exp() - target, 0))
        ctx.save_for_backward(gradient_RV)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient_RV,) = ctx.saved_tensors
        return gradient_RV * outputs[0].to(gradient_RV.dtype), None, None
