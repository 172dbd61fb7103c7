"""Ridge regression of sums that may be slightly less than positive definite because of rounding."""

from collections.abc import Iterable

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean square of an input
_STEP = 10.0
_TRIES = 12


def ridge_regression(gram_II: Tensor, cross_IO: Tensor, free: int = 0) -> tuple[Tensor, Tensor]:
    """Solve ``(gram + ridge) map = cross``, in float64.

    Inputs may depend on each other, be few, or be 0: the ridge makes the sums positive definite. If the rounding of
    large sums is larger than the ridge, the ridge grows until it is not.

    Args:
        gram_II: sums of products of inputs, finite. The last input is a constant.
        cross_IO: sums of products of inputs and outputs, finite.
        free: the number of last inputs without a ridge at first.

    Returns:
        map_IO, and the lower triangular L_II with ``L L^T = gram + ridge``.
    """
    gram_II = gram_II.double()
    size = float(gram_II.diagonal()[:-1].mean())
    ridge_I = torch.full_like(gram_II[0], max(RIDGE * size, torch.finfo(torch.float32).tiny))
    ridge_I[len(ridge_I) - free :] = 0
    for _ in range(_TRIES):
        lower_II, failed = torch.linalg.cholesky_ex(gram_II + ridge_I.diag())
        if not failed:
            return torch.cholesky_solve(cross_IO.double(), lower_II), lower_II
        ridge_I = (_STEP * ridge_I).clamp_min(float(ridge_I.max()))
    raise AssertionError("sums of products that no ridge makes positive definite")


def check_converged(what: str, values: Iterable[Tensor]) -> None:
    """Raise ValueError unless all values are finite. Sums over a model that diverged are not."""
    if not all(one.isfinite().all() for one in values):
        raise ValueError(f"{what} has become NaN or infinite, training diverged: give a lower learning rate")
