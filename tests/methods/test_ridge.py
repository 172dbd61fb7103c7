"""Regression with a ridge."""

import pytest
import torch

from lte.methods.ridge import RIDGE, ridge_regression


def inputs(rows: int, width: int = 20):
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(rows, width + 1, generator=generator, dtype=torch.float64)
    x_TI[:, -1] = 1
    return x_TI, torch.randn(rows, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("rows", [500, 21, 3, 1])
def test_it_solves_the_equations_with_its_ridge(rows, free):
    x_TI, y_TO = inputs(rows)
    gram_II, cross_IO = x_TI.T @ x_TI, x_TI.T @ y_TO
    map_IO, lower_II = ridge_regression(gram_II, cross_IO, free)
    ridge_I = (lower_II @ lower_II.T - gram_II).diagonal()
    wanted = torch.full_like(ridge_I, RIDGE * float(gram_II.diagonal()[:-1].mean()))
    wanted[len(wanted) - free :] = 0
    torch.testing.assert_close(ridge_I, wanted, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close((gram_II + wanted.diag()) @ map_IO, cross_IO)


def test_sums_that_rounding_left_less_than_positive_definite():
    """One input outweighs the others, and an eigenvalue is -5e-4 of the largest: 20 times the ridge."""
    x_TI, y_TO = inputs(100)
    basis_II = torch.linalg.qr(x_TI[:21])[0]
    values_I = torch.tensor([1e6] + [100.0] * 19 + [-500.0], dtype=torch.float64)
    gram_II = basis_II * values_I @ basis_II.T
    assert torch.linalg.cholesky_ex(gram_II + 25 * torch.eye(21))[1] > 0
    map_IO, lower_II = ridge_regression(gram_II, x_TI.T @ y_TO, free=1)
    assert map_IO.isfinite().all()
    torch.testing.assert_close(lower_II @ (lower_II.T @ map_IO), x_TI.T @ y_TO)
    added = (lower_II @ lower_II.T - gram_II).diagonal()
    assert 100 < added.min() <= added.max() < 20_000


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_inputs_of_any_size(size):
    x_TI, y_TO = inputs(100)
    x_TI[:, :-1] *= size
    map_IO, _ = ridge_regression(x_TI.T @ x_TI, x_TI.T @ y_TO, free=1)
    assert map_IO.isfinite().all()
    if size == 0:
        torch.testing.assert_close(map_IO[-1], y_TO.mean(0))
        assert not map_IO[:-1].any()
