"""The distillation losses, written out."""

import pytest
import torch
from torch.nn import functional as F

from lte.training.distillation import hidden_state_error, summed_kl


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
