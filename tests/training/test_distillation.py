"""The distillation loss against plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from lte.training.distillation import summed_kl


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
