"""Int4 by GPTQ: weights of later inputs make up for the rounding of earlier ones (Frantar et al., arXiv 2210.17323)."""

import torch
from torch import Tensor

from lte.ops.quantise import int4_scales, nearest, pack_int4
from lte.ops.weights import INT4_GROUP, Matrix

_DAMPING = 0.01
"""A part of the mean of the Gram matrix's diagonal that is added to the diagonal, as in the paper."""
_BLOCK = 32
"""Inputs after which the weights of all later inputs are updated. Within a block, those of the block are."""


@torch.no_grad()
def int4_with_feedback(rows_RD: Tensor, gram_II: Tensor, transposed: bool) -> Matrix:
    """Return an int4 matrix whose product with the inputs is close to that of ``rows_RD``.

    Scales come first. In a down projection they favour the neurons with large values. Then each input's weights are
    rounded, from the largest inputs to the smallest. The error is spread over the weights of later inputs, as the
    inverse of the Gram matrix says.

    Args:
        rows_RD: a row for each neuron.
        gram_II: the sum of ``x x^T`` over the inputs ``x`` of some tokens, in fp32.
        transposed: whether a row is an input, as in a down projection. Else a column is.
    """
    energy_I = gram_II.diagonal()
    groups_GND = rows_RD.float().unflatten(0, (-1, INT4_GROUP))
    scales_GD = int4_scales(groups_GND, rows_RD.dtype, energy_I.view(-1, INT4_GROUP, 1) if transposed else None)
    scales_RD = scales_GD.float().repeat_interleave(INT4_GROUP, dim=0)
    order_I = energy_I.argsort(descending=True, stable=True)
    weight_IO, scales_IO = (
        (one if transposed else one.T)[order_I].contiguous() for one in (groups_GND.flatten(0, 1), scales_RD)
    )
    numbers_IO = _rounded(weight_IO, scales_IO, _spread(gram_II[order_I][:, order_I]))[order_I.argsort()]
    return pack_int4(numbers_IO if transposed else numbers_IO.T, scales_GD)


def _rounded(weight_IO: Tensor, scales_IO: Tensor, spread_II: Tensor) -> Tensor:
    """Return the whole number of each weight, input by input. ``weight_IO`` is changed."""
    numbers_IO = torch.empty_like(weight_IO)
    for start in range(0, len(weight_IO), _BLOCK):
        block = slice(start, start + _BLOCK)
        weight_BO, spread_BB = weight_IO[block], spread_II[block, block]
        error_BO = torch.empty_like(weight_BO)
        for i, weight_O in enumerate(weight_BO):
            scales_O = scales_IO[start + i]
            numbers_IO[start + i] = nearest(weight_O, scales_O, -8, 7)
            error_BO[i] = (weight_O - numbers_IO[start + i] * scales_O) / spread_BB[i, i]
            weight_BO[i + 1 :] -= spread_BB[i, i + 1 :, None] * error_BO[i]
        weight_IO[block.stop :] -= spread_II[block, block.stop :].T @ error_BO
    return numbers_IO


def _spread(gram_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix."""
    damped_II = gram_II.double().clone()
    damped_II.diagonal().add_(_DAMPING * damped_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    return torch.linalg.cholesky(inverse_II, upper=True).float()
