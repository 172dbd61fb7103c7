"""Int4 by GPTQ: less error of outputs than by rounding to the nearest, and the form that backends read."""

import pytest
import torch
from random_ffn import relative_rms

from lte.ops.error_feedback import int4_with_feedback
from lte.ops.quantise import quantise


def drawn(R: int = 128, D: int = 96, transposed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(0)
    width = R if transposed else D
    x = torch.randn(1000, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return torch.randn(R, D, generator=generator), x * torch.rand(width, generator=generator)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(128, 96), (64, 50), (32, 2)])
def test_outputs_have_less_error(shape, transposed):
    rows, x = drawn(*shape, transposed)
    expected = x @ (rows if transposed else rows.T)
    errors = []
    for matrix in (int4_with_feedback(rows, x.T @ x, transposed), quantise(rows, "int4", transposed)):
        floats = matrix.floats(torch.float32)
        errors.append(relative_rms(x @ (floats if transposed else floats.T), expected))
    assert errors[0] < 0.8 * errors[1] or shape == (32, 2)
    assert errors[0] < 0.12


def test_independent_inputs_are_rounded_to_the_nearest():
    rows, _ = drawn()
    found, expected = int4_with_feedback(rows, torch.eye(96), transposed=False), quantise(rows, "int4")
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_that_never_occur_and_equal_bits(transposed):
    rows, x = drawn(transposed=transposed)
    x[:, 3] = 0
    first, again = (int4_with_feedback(rows.bfloat16(), x.T @ x, transposed) for _ in range(2))
    assert torch.equal(first.rows, again.rows)
    assert torch.equal(first.scales, again.scales)
    assert first.dtype == torch.bfloat16
    assert relative_rms(first.floats(torch.float32), rows) < 0.5


def test_a_large_input_of_a_down_projection_is_exact():
    rows, x = drawn(transposed=True)
    x[0, 5] = 3000.0
    matrix = int4_with_feedback(rows, x.T @ x, transposed=True)
    nearest = quantise(rows, "int4", transposed=True)
    error, plain = (relative_rms(one.floats(torch.float32)[5], rows[5]) for one in (matrix, nearest))
    assert error < plain / 2
