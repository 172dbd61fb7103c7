"""Int4 by GPTQ: weights of later inputs make up for the rounding of earlier ones (Frantar et al., arXiv 2210.17323)."""

import torch
from torch import Tensor

from lte.ops.quantise import int4_scales, nearest, pack_int4
from lte.ops.weights import INT4_GROUP, Matrix

_DAMPING = 0.01
"""A part of the mean of the Gram matrix's diagonal that is added to the diagonal, as in the paper."""


@torch.no_grad()
def int4_with_feedback(rows_RD: Tensor, gram_II: Tensor, transposed: bool) -> Matrix:
    """Return an int4 matrix whose product with the inputs is close to that of ``rows_RD``.

    Each input's weights are rounded in turn. The error is spread over the weights of later inputs, as the inverse of
    the Gram matrix says. Scales are those of the least squared error of the weights as they are at that moment.

    Args:
        rows_RD: a row for each neuron.
        gram_II: the sum of ``x x^T`` over the inputs ``x`` of some tokens, in fp32.
        transposed: whether a row is an input, as in a down projection. Else a column is.
    """
    dtype = rows_RD.dtype
    weight_IO = (rows_RD if transposed else rows_RD.T).float().clone()
    spread_II = _spread(gram_II)
    numbers_IO, scales = torch.empty_like(weight_IO), []
    for start in range(0, len(weight_IO), INT4_GROUP):
        block = slice(start, start + INT4_GROUP)
        weight_BO, spread_BB = weight_IO[block], spread_II[block, block]
        error_BO = torch.zeros_like(weight_BO)
        if transposed:  # the inputs of a block share scales
            scales.append(int4_scales(weight_BO[None], dtype))
        for i, weight_O in enumerate(weight_BO):
            if not transposed:  # 32 outputs of an input share a scale
                scales.append(int4_scales(weight_O.view(-1, INT4_GROUP, 1), dtype).T)
            scales_O = scales[-1][0].float()
            scales_O = scales_O if transposed else scales_O.repeat_interleave(INT4_GROUP)
            numbers_IO[start + i] = nearest(weight_O, scales_O, -8, 7)
            error_BO[i] = (weight_O - numbers_IO[start + i] * scales_O) / spread_BB[i, i]
            weight_BO[i + 1 :] -= spread_BB[i, i + 1 :, None] * error_BO[i]
        weight_IO[block.stop :] -= spread_II[block, block.stop :].T @ error_BO
    if transposed:
        return pack_int4(numbers_IO, torch.cat(scales))
    return pack_int4(numbers_IO.T, torch.cat(scales).T.contiguous())


def _spread(gram_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix."""
    gram_II = gram_II.double()
    mean = gram_II.diagonal().mean()
    damped_II = gram_II + torch.eye(len(gram_II), dtype=torch.double, device=gram_II.device) * _DAMPING * mean
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    return torch.linalg.cholesky(inverse_II, upper=True).float()
