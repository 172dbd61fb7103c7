"""The distillation losses: KL divergence from a teacher's distribution of tokens, and the error of hidden states."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lte.data.batches import IGNORED
from lte.modules.evaluating import evaluating
from lte.modules.token_masks import TokenMasks

_ROWS = 2048
"""Rows that are computed at a time if nothing is compiled: logits of a vocabulary in fp32 are large."""

Piece = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def summed_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``sum KL(teacher || student)`` over rows, in fp32.

    Args:
        student: logits ``[..., V]``, with gradient.
        teacher: logits of the same shape, without gradient.
        mask: which rows count, ``[...]``; None for all.

    Returns:
        A scalar. Its gradient has the student's dtype.
    """
    every = torch.zeros(student.shape[:-1], dtype=torch.long, device=student.device)
    labels = every if mask is None else every.masked_fill(~mask.bool(), IGNORED)
    return summed_mix(student, teacher, labels, 1.0)[0]


def summed_mix(
    student: Tensor, teacher: Tensor, labels: Tensor, share: float, piece: Piece | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(1 - share) * cross entropy + share * KL(teacher || student)``, summed over rows, in fp32.

    The gradient of both losses together is computed in the forward pass. Plain autograd would keep several fp32 copies
    of all logits and read them many times.

    Args:
        student: logits ``[..., V]``, with gradient.
        teacher: logits of the same shape, without gradient.
        labels: ``[...]``; rows with -100 do not count.
        share: in [0, 1].
        piece: the compiled :func:`mix_rows`. None runs it uncompiled, on few rows at a time.

    Returns:
        Three scalars: the mix, whose gradient has the student's dtype, and without gradient cross entropy and KL.
    """
    logits = [one.reshape(-1, one.shape[-1]) for one in (student, teacher)]
    return _SummedMix.apply(*logits, labels.reshape(-1, 1), share, piece)  # pyright: ignore


def mix_rows(student_RV: Tensor, teacher_RV: Tensor, labels_R1: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return summed cross entropy, summed KL, and the gradient ``[R, V]`` of their mix by the student's logits."""
    log_student, log_teacher = student_RV.float().log_softmax(-1), teacher_RV.float().log_softmax(-1)
    target = log_teacher.exp()
    counts_R1 = labels_R1 != IGNORED
    picked_R1 = labels_R1.clamp_min(0)
    kl_R1 = (target * (log_teacher - log_student)).sum(-1, keepdim=True)
    label = torch.where(torch.arange(student_RV.shape[-1], device=student_RV.device) == picked_R1, 1 - share, 0.0)
    gradient = log_student.exp() - share * target - label
    # where, not a product: a row that does not count may have infinities
    return (
        torch.where(counts_R1, -log_student.gather(-1, picked_R1), 0).sum(),
        torch.where(counts_R1, kl_R1, 0).sum(),
        torch.where(counts_R1, gradient, 0).to(student_RV.dtype),
    )


class DistilledLoss:
    """Replaces ``ForCausalLMLoss`` of transformers by a mix with KL to a teacher.

    The model calls it in its forward pass. So it gets the logits before mixed precision copies them to fp32.

    Attributes:
        parts: cross entropy and KL of the last call, with the divisor of the loss; None before the first call.
    """

    def __init__(self, teacher: Tensor, share: float, piece: Piece | None):
        self.teacher, self.share, self.piece = teacher, share, piece
        self.parts: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
        shift_labels = shift_labels.to(logits.device).masked_fill(shift_labels == ignore_index, IGNORED)
        loss, *parts = self.sums(logits, shift_labels)
        items = (shift_labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        self.parts = parts[0] / items, parts[1] / items
        return loss / items

    def sums(self, student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result of :func:`summed_mix` for the student's logits."""
        return summed_mix(student, self.teacher, labels, self.share, self.piece)

    def mix(
        self,
        loss: Tensor,
        student: Tensor,
        mask: Tensor | None,
        num_items: Tensor | int | None,
        scale: int,
        problem: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the training loss and its two parts, task loss and KL. If the model did not mix them, do it here.

        Args:
            loss: ``Trainer``'s loss of the forward pass: the mix if the model called this object, else the task loss.
            student: logits of that pass.
            mask: which rows of them count, as in :func:`summed_kl`.
            num_items: the divisor of sums; None takes the number of rows that count.
            scale: the factor by which ``Trainer`` multiplied the loss.
            problem: of a head with one answer for each row, as in :func:`head_error`.
        """
        if self.parts is not None:
            task, kl = self.parts
            return loss, task * scale, kl * scale
        if num_items is None:
            num_items = student[..., 0].numel() if mask is None else mask.sum()
        kl = head_error(student, self.teacher, problem) if student.ndim == 2 else summed_kl(student, self.teacher, mask)
        kl = kl / num_items * scale
        return (1 - self.share) * loss + self.share * kl, loss, kl


def predicts(labels: Tensor | None, logits: Tensor, causal: bool) -> Tensor | None:
    """Return which logits belong to a label that counts, ``[B, S]``; None if all do, as in a classifier.

    Args:
        causal: whether a logit is of the next token.
    """
    if logits.ndim != 3 or labels is None:
        return None
    return (F.pad(labels[:, 1:], (0, 1), value=IGNORED) if causal else labels).ne(IGNORED)


def is_causal(model: nn.Module) -> bool:
    """Return whether the model, or the model inside its wrappers, learns to predict the next token."""
    inner = _by_causal_loss(model)
    return inner is not None and not inner.config.is_encoder_decoder


def _by_causal_loss(model: nn.Module) -> PreTrainedModel | None:
    """Return the model inside its wrappers if its loss is ``ForCausalLMLoss``; else None."""
    inner = next((one for one in model.modules() if isinstance(one, PreTrainedModel)), None)
    return inner if inner is not None and inner.loss_function is ForCausalLMLoss else None


def head_error(student: Tensor, teacher: Tensor, problem: str | None) -> Tensor:
    """Return the error of a head's outputs ``[B, C]`` against the teacher's, summed over rows, in fp32.

    Args:
        problem: ``problem_type`` of transformers. ``regression`` and heads with one output have the squared error.
            ``multi_label_classification`` has divergences of independent labels. Others have the KL of the classes.
    """
    student, teacher = student.float(), teacher.float()
    if problem == "regression" or student.shape[-1] == 1:
        return (student - teacher).square().mean(-1).sum()
    if problem == "multi_label_classification":
        target = teacher.sigmoid()
        loss = F.binary_cross_entropy_with_logits
        error = loss(student, target, reduction="none") - loss(teacher, target, reduction="none")
        return error.mean(-1).sum()
    return summed_kl(student, teacher)


@contextmanager
def causal_loss(model: nn.Module, loss: Callable[..., Tensor] | None) -> Iterator[None]:
    """Let a causal language model call ``loss`` in place of ``ForCausalLMLoss`` inside the context. Others do not.

    Args:
        model: the model or a wrapper around it.
        loss: None changes nothing.
    """
    inner = None if loss is None else _by_causal_loss(model)
    if inner is None:
        yield
        return
    inner.loss_function = loss
    try:
        yield
    finally:
        del inner._loss_function


def hidden_state_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Return ``|s - t|^2 / |t|^2``, a scalar: the mean over tokens and layers, in fp32.

    Each token has the same weight. A ratio of means would measure almost only the first token of a text: in blocks 11
    to 20 of SmolLM2-135M it has 90 to 97 % of the squares of a row of 1024 tokens. Backward keeps one fp32 tensor for
    each layer, and none of the teacher's.

    Args:
        student: hidden states ``[..., D]`` by layer, with gradient.
        teacher: those of the teacher, without gradient.
        mask: which tokens count, ``[...]``; None for all.
    """
    total = torch.zeros((), device=student[0].device)
    for student_TD, teacher_TD in zip(student, teacher, strict=True):
        error_TD, size_T = student_TD.float() - teacher_TD.float(), teacher_TD.float().square().sum(-1)
        if mask is not None:  # where, not a product: padding may have infinities
            counts_T = mask.bool()
            error_TD, size_T = torch.where(counts_T.unsqueeze(-1), error_TD, 0), torch.where(counts_T, size_T, 1)
        tokens = size_T.numel() if mask is None else mask.bool().sum().clamp_min(1)
        total = total + (error_TD.square().sum(-1) / size_T).sum() / tokens
    return total / len(student)


def block_error(student: Any, teacher: Any, masks: TokenMasks) -> Tensor:
    """Return :func:`hidden_state_error` of the outputs of every block. Padding does not count."""
    errors = []
    for prefix in ("encoder_", "decoder_") if "decoder_hidden_states" in student else ("",):
        blocks = student[f"{prefix}hidden_states"][1:]  # 0 is the embeddings
        mask = masks.of(prefix.rstrip("_"), blocks[0].shape[:-1])
        errors.append(hidden_state_error(blocks, teacher[f"{prefix}hidden_states"][1:], mask))
    return torch.stack(errors).mean()


@torch.no_grad()
def show_hidden_states_(model: nn.Module) -> None:
    """Make transformers put its hooks for hidden states on the blocks now. By default it does so at the first request.

    In a compiled model a later hook would break the program into pieces.
    """
    inputs: Any = {name: value[:1] for name, value in cast(Any, model).dummy_inputs.items()}
    device = next(model.parameters()).device
    with evaluating(model):
        model(**{name: value.to(device) for name, value in inputs.items()}, output_hidden_states=True)


class _SummedMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_RV: Tensor, teacher_RV: Tensor, labels_R1: Tensor, share: float, piece: Piece | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if piece is not None:
            cross_entropy, kl, gradient_RV = piece(student_RV, teacher_RV, labels_R1, share)
        else:
            cross_entropy = kl = torch.zeros((), device=student_RV.device)
            gradient_RV = torch.empty_like(student_RV)
            rows = zip(*(one.split(_ROWS) for one in (student_RV, teacher_RV, labels_R1, gradient_RV)), strict=True)
            for student, teacher, labels, gradient in rows:
                more_cross_entropy, more_kl, found = mix_rows(student, teacher, labels, share)
                cross_entropy, kl = cross_entropy + more_cross_entropy, kl + more_kl
                gradient.copy_(found)
        ctx.save_for_backward(gradient_RV)
        ctx.mark_non_differentiable(cross_entropy, kl)
        return (1 - share) * cross_entropy + share * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient_RV,) = ctx.saved_tensors
        # in place, because nobody else has the tensor; as a list, because a product with a number on the device is slow
        torch._foreach_mul_([gradient_RV], outputs[0].to(gradient_RV.dtype))  # pyright: ignore
        return gradient_RV, None, None, None, None
