"""The distillation losses, written out."""

from types import SimpleNamespace

import pytest
import torch
from tiny_training import dense_llama
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from lte.training.distillation import (
    DistilledLoss,
    causal_loss,
    hidden_state_error,
    mix_rows,
    summed_kl,
    summed_mix,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 2049])
def test_value_and_gradient(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    student = torch.randn(rows, 11, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(rows, 11, generator=generator).to(dtype)
    mask = torch.rand(rows, generator=generator) < 0.7
    plain = student.detach().float().requires_grad_()
    expected = F.kl_div(
        plain[mask].log_softmax(-1), teacher[mask].float().log_softmax(-1), log_target=True, reduction="sum"
    )
    found = summed_kl(student, teacher, mask)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * expected).backward()
    (3 * found).backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    error = (student.grad.float() - plain.grad).norm() / plain.grad.norm().clamp(min=1e-9)
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    assert student.grad[~mask].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [None, mix_rows])
def test_both_losses_and_their_gradient(dtype, piece):
    generator = torch.Generator().manual_seed(1)
    student = (3 * torch.randn(2049, 11, generator=generator)).to(dtype).requires_grad_()
    teacher = torch.randn(2049, 11, generator=generator).to(dtype)
    labels = torch.randint(0, 11, (2049,), generator=generator)
    labels[::3] = -100
    mask, plain = labels != -100, student.detach().float().clone().requires_grad_()
    student.data[::3] = torch.inf  # does not count
    expected = (
        F.cross_entropy(plain, labels, ignore_index=-100, reduction="sum"),
        F.kl_div(plain[mask].log_softmax(-1), teacher[mask].float().softmax(-1), reduction="sum"),
    )
    mixed, *parts = summed_mix(student, teacher, labels, 0.9, piece)
    assert [one.item() for one in parts] == pytest.approx([one.item() for one in expected], rel=1e-5)
    assert mixed.item() == pytest.approx(0.1 * parts[0].item() + 0.9 * parts[1].item(), rel=1e-5)
    assert [one.requires_grad for one in (mixed, *parts)] == [True, False, False]
    (3 * (0.1 * expected[0] + 0.9 * expected[1])).backward()
    (3 * mixed).backward()
    assert student.grad is not None
    error = (student.grad.float() - plain.grad).norm() / plain.grad.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("items", [None, torch.tensor(17)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_causal_model_calls_the_distilled_loss(items, shifted):
    """Without a share for the teacher it is transformers' own loss."""
    model, ids = dense_llama(), torch.arange(3, 27).reshape(2, 12)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    batch = {"input_ids": ids, "labels": labels}
    if items is not None:
        batch["num_items_in_batch"] = items
    if shifted:
        batch["shift_labels"] = labels.flip(1)
    loss = DistilledLoss(torch.randn(2, 12, 64), 0.0, None)
    with causal_loss(model, loss):
        found = model(**batch).loss
    assert model.loss_function is ForCausalLMLoss
    expected = model(**batch).loss
    torch.testing.assert_close(found, expected)
    assert loss.parts is not None
    torch.testing.assert_close(loss.parts[0], expected.detach())
    for one, other in zip(*(torch.autograd.grad(x, model.lm_head.weight) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_loss_of_ones_own_is_left_alone():
    model = dense_llama()
    model.loss_function = own = SimpleNamespace()
    with causal_loss(model, DistilledLoss(torch.zeros(1), 0.5, None)):
        assert model.loss_function is own
    assert model.loss_function is own


def test_no_mask_and_leading_shape():
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    assert summed_kl(student, teacher) == pytest.approx(
        summed_kl(student.flatten(0, 1), teacher.flatten(0, 1)).item(), rel=1e-6
    )
    assert summed_kl(student, student).abs() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_state_error(dtype):
    torch.manual_seed(0)
    student = [torch.randn(2, 5, 8).to(dtype).requires_grad_() for _ in range(3)]
    teacher = [(3 * torch.randn(2, 5, 8)).to(dtype) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    pairs = [(s[mask.bool()].float(), t[mask.bool()].float()) for s, t in zip(student, teacher, strict=True)]
    expected = sum((((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean() for s, t in pairs) / 3
    gradients = torch.autograd.grad(expected, student)
    for one in (*student, *teacher):  # padding is not read
        one.data[~mask.bool()] = torch.nan
    found = hidden_state_error(student, teacher, mask)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert hidden_state_error(teacher, teacher, mask) == 0
    for one, other in zip(torch.autograd.grad(found, student), gradients, strict=True):
        torch.testing.assert_close(one, other)
    rows = [[one[:1] for one in two] for two in (student, teacher)]
    assert hidden_state_error(*rows).item() == pytest.approx(hidden_state_error(*rows, mask[:1]).item(), rel=1e-6)


def test_a_second_backward_pass_is_an_error_not_another_gradient():
    student = torch.randn(3, 7, requires_grad=True)
    loss = 2 * summed_kl(student, torch.randn(3, 7))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
